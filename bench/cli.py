"""The suite's command line: `compiled-llm bench COMMAND` or `python -m bench COMMAND`. Bad input is one line and exit code 2."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.systems import SYSTEMS, check_names
from compiled_llm.cli.exit_status import run_command

if TYPE_CHECKING:  # torch takes seconds to import
    from bench.commands import Bench

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Benchmarks, against peers where there are some.",
)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file such as configs/qwen3-0.6b-random.yaml."),
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated.")
]
Systems = Annotated[
    str,
    typer.Option(
        help=f"Which, with commas; the first is what ratios refer to. {', '.join(SYSTEMS)}."
    ),
]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes, with commas.")]
Batch = Annotated[int, typer.Option("--batch", help="Sequences that decode.")]
Context = Annotated[int, typer.Option(help="Prompt tokens of each sequence.")]
Steps = Annotated[int, typer.Option(help="Decode steps of a sample.")]
Rounds = Annotated[
    int, typer.Option(help="Samples of each figure; systems take turns. The table shows medians.")
]
Out = Annotated[
    Path | None,
    typer.Option(help="Where results are kept; bench/results of the checkout when left out."),
]
Limit = Annotated[float, typer.Option(help="Seconds that one call of a system may take.")]
VllmPath = Annotated[
    str | None,
    typer.Option(
        "--vllm-pythonpath",
        envvar="BENCH_VLLM_PYTHONPATH",
        help="Searched first, in vLLM's process alone.",
    ),
]


@app.command()
def latency(
    config: ConfigFile = None, overrides: Overrides = [], systems: Systems = "ours,transformers", batch: Batches = "1,8,32",  # noqa: B006
    context: Context = 128, steps: Steps = 50, rounds: Rounds = 5, out: Out = None, limit: Limit = 3600.0,
    vllm_pythonpath: VllmPath = None,
) -> None:  # fmt: skip
    """Milliseconds of a decode step and to the first token, over batch sizes."""
    from bench.commands import run_latency
    from bench.latency import Plan

    plan = Plan(batches=_numbers(batch, "--batch"), context=context, steps=steps, rounds=rounds)
    names = check_names(_names(systems))
    run_latency(_begin(config, overrides, out, limit, vllm_pythonpath), names, plan)


@app.command()
def throughput(
    config: ConfigFile = None, overrides: Overrides = [], systems: Systems = "ours",  # noqa: B006
    prompts: Annotated[int, typer.Option(help="How many; with --sharegpt, how many at most.")] = 256,
    prompt_lengths: Annotated[str, typer.Option(metavar="A-B", help="Tokens of a prompt, between both.")] = "100-1024",
    output_lengths: Annotated[str, typer.Option(metavar="A-B", help="Tokens of an output, between both.")] = "100-1024",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    sharegpt: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Take lengths from conversations.")] = None,
    profile: Annotated[int, typer.Option(metavar="STEPS", help="Profile so many steps of ours, for the GPU's idle share.")] = 0,
    rounds: Rounds = 5, out: Out = None, limit: Limit = 3600.0, vllm_pythonpath: VllmPath = None,
) -> None:  # fmt: skip
    """Output tokens a second, all prompts at once; the defaults are the offline workload of nano-vllm and mini-sglang."""
    from bench.commands import run_throughput
    from bench.throughput import Mix

    mix = Mix(
        prompts=prompts, prompt_lengths=_range(prompt_lengths, "--prompt-lengths"),
        output_lengths=_range(output_lengths, "--output-lengths"), temperature=temperature, sharegpt=sharegpt,
    )  # fmt: skip
    names = check_names(_names(systems))
    run_throughput(
        _begin(config, overrides, out, limit, vllm_pythonpath),
        names,
        mix,
        rounds=rounds,
        profile=profile,
    )


@app.command()
def startup(
    config: ConfigFile = None, overrides: Overrides = [], systems: Systems = "ours", context: Context = 128,  # noqa: B006
    rounds: Rounds = 1, out: Out = None, limit: Limit = 3600.0, vllm_pythonpath: VllmPath = None,
) -> None:  # fmt: skip
    """From a fresh process to the first token: with empty compiler caches, then with what that left in them."""
    from bench.commands import run_startup

    names = check_names(_names(systems))
    run_startup(
        _begin(config, overrides, out, limit, vllm_pythonpath),
        names,
        context=context,
        rounds=rounds,
    )


@app.command()
def buckets(
    config: ConfigFile = None, overrides: Overrides = [],  # noqa: B006
    largest: Annotated[int | None, typer.Option(help="The last batch size; limits.max_num_seqs when left out.")] = None,
    context: Context = 128, steps: Steps = 20, rounds: Rounds = 5, out: Out = None, limit: Limit = 3600.0,
) -> None:  # fmt: skip
    """A decode step at every batch size: its bucket, its padding, and the cliffs."""
    from bench.commands import run_buckets

    run_buckets(
        _begin(config, overrides, out, limit),
        context=context,
        steps=steps,
        rounds=rounds,
        largest=largest,
    )


@app.command()
def passes(
    config: ConfigFile = None, overrides: Overrides = [],  # noqa: B006
    only: Annotated[str, typer.Option(metavar="NAMES", help="Leave out these alone, with commas; all of them by default.")] = "",
    batch: Batches = "1,8,32", context: Context = 128, steps: Steps = 50, rounds: Rounds = 5, out: Out = None,
    limit: Limit = 3600.0,
) -> None:  # fmt: skip
    """Each graph pass off in turn: what it earns."""
    from bench.commands import run_passes

    batches = _numbers(batch, "--batch")
    bench, left_out = _begin(config, overrides, out, limit), _names(only)
    run_passes(bench, only=left_out, batches=batches, context=context, steps=steps, rounds=rounds)


@app.command()
def stream(
    config: ConfigFile = None, overrides: Overrides = [], systems: Systems = "ours,ours-eager", batch: Batch = 1,  # noqa: B006
    context: Context = 128, steps: Steps = 20, rounds: Rounds = 5, out: Out = None, limit: Limit = 3600.0,
) -> None:  # fmt: skip
    """Graph against eager: launches, host time and the GPU's idle share of a decode step."""
    from bench.commands import run_stream

    names = check_names(_names(systems))
    ours = [name for name in SYSTEMS if name.startswith("ours")]
    if any(name not in ours for name in names):
        raise ValueError(
            f"--systems {systems}: stream looks into engines of ours, expected some of {', '.join(ours)}"
        )
    run_stream(
        _begin(config, overrides, out, limit),
        names,
        batch=batch,
        context=context,
        steps=steps,
        rounds=rounds,
    )


@app.command()
def kernels(
    config: ConfigFile = None, overrides: Overrides = [],  # noqa: B006
    only: Annotated[str | None, typer.Option("-k", help="A pytest expression, e.g. decode.")] = None,
    out: Out = None, limit: Limit = 3600.0,
) -> None:  # fmt: skip
    """Paged attention alone, against bytes, and against torch's sdpa and flex_attention."""
    from bench.commands import run_kernels

    run_kernels(_begin(config, overrides, out, limit), only=only)


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    raise SystemExit(run_command(app, sys.argv[1:], prog_name="python -m bench"))


def _begin(
    config: Path | None,
    overrides: list[str],
    out: Path | None,
    limit: float,
    vllm_pythonpath: str | None = None,
) -> "Bench":
    from bench.commands import Bench
    from bench.record import RESULTS
    from bench.worker_group import Options
    from compiled_llm import load_config

    options = Options(limit=limit, vllm_pythonpath=vllm_pythonpath)
    return Bench.begin(load_config(config, overrides), options, out or RESULTS)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str, option: str) -> list[int]:
    parts = _names(text)
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(
            f"{option} {text!r}: expected positive numbers with commas, such as 1,8,32"
        )
    return [int(part) for part in parts]


def _range(text: str, option: str) -> tuple[int, int]:
    parts = text.split("-")
    if (
        len(parts) != 2
        or not all(part.isdecimal() for part in parts)
        or not 0 < int(parts[0]) <= int(parts[1])
    ):
        raise ValueError(
            f"{option} {text!r}: expected two numbers, the smaller first, such as 100-1024"
        )
    return int(parts[0]), int(parts[1])
