"""Command line of the suite: `compiled-llm bench COMMAND` or `python -m bench COMMAND`.

Torch is imported inside of the commands, so that `--help` stays fast.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bench.options import (
    Batch,
    Batches,
    ConfigFile,
    Context,
    Largest,
    Limit,
    OnlyKernels,
    OnlyPasses,
    Out,
    OutputLengths,
    Overrides,
    ProfileSteps,
    PromptLengths,
    Prompts,
    Rounds,
    ShareGPT,
    Steps,
    Systems,
    Temperature,
    VLLMPath,
    parse_names,
    parse_numbers,
    parse_range,
)
from bench.systems import SYSTEMS, validate_systems
from compiled_llm.cli.exit_status import run_command

if TYPE_CHECKING:
    from bench.run import BenchRun

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Benchmarks of this project, and of other systems in the same way.",
)


@app.command()
def latency(
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    systems: Systems = "ours,transformers",
    batch: Batches = "1,8,32",
    context: Context = 128,
    steps: Steps = 50,
    rounds: Rounds = 5,
    out: Out = None,
    limit: Limit = 3600.0,
    vllm_pythonpath: VLLMPath = None,
) -> None:
    """Measure milliseconds per decode step and to the first tokens, by batch size."""
    from bench.latency import LatencySettings, run

    batches = parse_numbers(batch, "--batch")
    settings = LatencySettings(batches=batches, context=context, steps=steps, rounds=rounds)
    names = validate_systems(parse_names(systems))
    run(_begin(config, overrides, out, limit, vllm_pythonpath), names, settings)


@app.command()
def throughput(
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    systems: Systems = "ours",
    prompts: Prompts = 256,
    prompt_lengths: PromptLengths = "100-1024",
    output_lengths: OutputLengths = "100-1024",
    temperature: Temperature = 0.6,
    sharegpt: ShareGPT = None,
    profile: ProfileSteps = 0,
    rounds: Rounds = 5,
    out: Out = None,
    limit: Limit = 3600.0,
    vllm_pythonpath: VLLMPath = None,
) -> None:
    """Measure output tokens per second with all prompts submitted at once.

    The defaults are the offline workload of nano-vllm and mini-sglang.
    """
    from bench.throughput import WorkloadSettings, run

    settings = WorkloadSettings(
        prompts=prompts,
        prompt_lengths=parse_range(prompt_lengths, "--prompt-lengths"),
        output_lengths=parse_range(output_lengths, "--output-lengths"),
        temperature=temperature,
        sharegpt=sharegpt,
    )
    names = validate_systems(parse_names(systems))
    bench = _begin(config, overrides, out, limit, vllm_pythonpath)
    run(bench, names, settings, rounds=rounds, profile_steps=profile)


@app.command()
def startup(
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    systems: Systems = "ours",
    context: Context = 128,
    rounds: Rounds = 1,
    out: Out = None,
    limit: Limit = 3600.0,
    vllm_pythonpath: VLLMPath = None,
) -> None:
    """Measure seconds from a fresh process to the first token, with cold and warm caches."""
    from bench.startup import run

    names = validate_systems(parse_names(systems))
    bench = _begin(config, overrides, out, limit, vllm_pythonpath)
    run(bench, names, context=context, rounds=rounds)


@app.command()
def buckets(
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    largest: Largest = None,
    context: Context = 128,
    steps: Steps = 20,
    rounds: Rounds = 5,
    out: Out = None,
    limit: Limit = 3600.0,
) -> None:
    """Measure a decode step at every batch size, with its bucket and padding."""
    from bench.buckets import run
    from bench.decode import DecodeSettings

    settings = DecodeSettings(context=context, steps=steps, rounds=rounds)
    run(_begin(config, overrides, out, limit), settings, max_batch=largest)


@app.command()
def passes(
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    only: OnlyPasses = "",
    batch: Batches = "1,8,32",
    context: Context = 128,
    steps: Steps = 50,
    rounds: Rounds = 5,
    out: Out = None,
    limit: Limit = 3600.0,
) -> None:
    """Measure the time that each graph pass saves, by leaving out one at a time."""
    from bench.decode import DecodeSettings
    from bench.passes import run

    batches = parse_numbers(batch, "--batch")
    settings = DecodeSettings(context=context, steps=steps, rounds=rounds)
    bench = _begin(config, overrides, out, limit)
    run(bench, settings, only=parse_names(only), batches=batches)


@app.command()
def stream(
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    systems: Systems = "ours,ours-eager",
    batch: Batch = 1,
    context: Context = 128,
    steps: Steps = 20,
    rounds: Rounds = 5,
    out: Out = None,
    limit: Limit = 3600.0,
) -> None:
    """Compare launches, host time and GPU idle time of a decode step, graphs against eager."""
    from bench.decode import DecodeSettings
    from bench.stream import run

    names = validate_systems(parse_names(systems))
    ours = [name for name in SYSTEMS if name.startswith("ours")]
    if any(name not in ours for name in names):
        raise ValueError(
            f"--systems {systems}: stream profiles engines of ours, "
            f"expected some of {', '.join(ours)}"
        )
    settings = DecodeSettings(context=context, steps=steps, rounds=rounds)
    run(_begin(config, overrides, out, limit), names, settings, batch=batch)


@app.command()
def kernels(
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    only: OnlyKernels = None,
    out: Out = None,
    limit: Limit = 3600.0,
) -> None:
    """Compare paged attention with torch's sdpa and flex_attention, and with the bandwidth."""
    from bench.kernel_runs import run

    run(_begin(config, overrides, out, limit), only=only)


def main() -> None:
    """Run the command in `sys.argv` and exit with its status."""
    raise SystemExit(run_command(app, sys.argv[1:], prog_name="python -m bench"))


def _begin(
    config: Path | None,
    overrides: list[str],
    out: Path | None,
    limit: float,
    vllm_pythonpath: str | None = None,
) -> "BenchRun":
    from bench.record import RESULTS
    from bench.run import BenchRun
    from bench.worker_group import WorkerOptions
    from compiled_llm import load_config

    options = WorkerOptions(timeout=limit, vllm_pythonpath=vllm_pythonpath)
    return BenchRun.begin(load_config(config, overrides), options, out or RESULTS)
