"""The command line: a thin face over the API. Bad input is one line on standard error and exit code 2."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from compiled_llm.cli.exit_status import invoke, run_command

app = typer.Typer(no_args_is_help=True, add_completion=False, help="LLM inference by compilation.")

buckets_app = typer.Typer(no_args_is_help=True, help="The static shapes that are compiled.")
app.add_typer(buckets_app, name="buckets")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A YAML file such as configs/smollm2-gpu.yaml.")
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated.")
]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE.jsonl", help="Many prompts, one JSON line each."),
]
AnswersFile = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE.jsonl", help="Their answers; what it holds already is kept."
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report-file",
        metavar="FILE",
        help="Write the report there: .html (plots), .json or .txt.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="A directory, hub id or .gguf file; the default model when left out."
    ),
]


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to complete, or (by default) to answer.")
    ] = None,
    prompts: PromptsFile = None,
    out: AnswersFile = None,
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006  # typer reads the default
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that add up to this.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from so many of the likeliest tokens; 0 is all.")
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(help="Draw from tokens at least this likely, relative to the likeliest."),
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="For reproducible sampling.")] = None,
    stop: Annotated[list[str], typer.Option(help="End at this text; may be repeated.")] = [],  # noqa: B006
    n: Annotated[int, typer.Option("--n", help="Completions of each prompt in --prompts.")] = 1,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete texts as they are, without the chat template.")
    ] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="Print what was done and what it cost, on standard error."),
    ] = False,
    report_file: ReportFile = None,
) -> None:
    """Answer a prompt, and print the text as it comes; or answer a file of prompts into another file.

    A line of --prompts is a JSON string, or an object with "prompt" (text or token ids) or "messages", and optionally "id" and
    "params". A line of --out is written as its prompt ends; a run that was killed goes on where it was when started again.
    """
    from compiled_llm import CompiledLLM, SamplingParams, load_config
    from compiled_llm.cli.generate import check_prompt_options, generate_file, generate_one
    from compiled_llm.report.export import check_report_path, output_report

    check_prompt_options(prompt, prompts, out, n)
    check_report_path(report_file)
    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    start = partial(CompiledLLM.from_pretrained, model, config=load_config(config, overrides))
    finish = partial(output_report, printed=report, file=report_file)
    if prompts is not None and out is not None:
        if not generate_file(start, prompts, out, params, raw=raw, finish=finish):
            raise typer.Exit(1)
    elif prompt is not None:
        generate_one(start, prompt, params, raw=raw, finish=finish)


@app.command()
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="A directory, hub id or .gguf file; by default what the config names."),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    start: Annotated[
        bool,
        typer.Option("--start", help="Start an engine: its phases, buckets, passes and fallbacks."),
    ] = False,
    report_file: ReportFile = None,
) -> None:
    """Say from a model's config alone what an engine would do with it, or why it would refuse it; no weights are read."""
    from compiled_llm import CompiledLLM, load_config
    from compiled_llm.cli.inspect import inspect_model
    from compiled_llm.report.export import check_report_path, output_report

    check_report_path(report_file)
    settings = load_config(
        config, overrides if model is None else [*overrides, f"model.name={model}"]
    )
    if not start and report_file is None:
        print(inspect_model(settings))
        return
    with CompiledLLM.from_pretrained(config=settings) as llm:
        print(llm.report())
        output_report(llm.report(), printed=False, file=report_file)


@app.command("compile")
def compile_buckets(
    config: Annotated[Path, typer.Argument(help="A YAML file such as configs/smollm2-cpu.yaml.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Where to; a directory of the cache when left out."
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    model: Model = None,
    report_file: ReportFile = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what DIR holds, whatever that was compiled for."),
    ] = False,
) -> None:
    """Compile all that a config lists, and keep it for later starts (`--set compile.artifact=DIR`)."""
    from compiled_llm import CompiledLLM, load_config
    from compiled_llm.report.export import check_report_path, output_report
    from compiled_llm.runtime.artifacts.artifact import discard

    check_report_path(report_file)
    if out is not None and force:
        discard(out)
    with CompiledLLM.from_pretrained(
        model, config=load_config(config, overrides), artifact=out
    ) as llm:
        report = llm.report()
    print(report)
    output_report(report, printed=False, file=report_file)
    kept_in = report.facts.get("artifact")
    if kept_in is None:
        expected = "expected compile.dispatch=direct, no compile.dump, and compile.artifact not off"
        raise ValueError(f"nothing was kept: {report.startup.artifact_refusal or expected}")
    if out is not None and kept_in != str(out):
        raise ValueError(
            f"{report.startup.artifact_refusal}; choose another directory, or add --force to replace what it holds"
        )
    missing = [
        bucket.save_failure or bucket.bucket
        for bucket in report.buckets
        if bucket.failure is None and not bucket.saved
    ]
    if missing:
        raise ValueError(f"{len(missing)} buckets could not be kept: {'; '.join(missing)}")


@app.command()
def verify(
    config: Annotated[Path, typer.Argument(help="A YAML file such as configs/smollm2-cpu.yaml.")],
    overrides: Overrides = [],  # noqa: B006
    model: Model = None,
) -> None:
    """Compare every bucket of a config with eager, on random batches (exit code 1 when one differs)."""
    from compiled_llm import CompiledLLM, load_config

    settings = load_config(
        config, [*overrides, "verify=true", "strict=false"]
    )  # all are to be seen, also after one that fails
    with CompiledLLM.from_pretrained(model, config=settings) as llm:
        report = llm.report()
    print(report.render_verification())
    if any(bucket.failure for bucket in report.buckets):
        raise typer.Exit(1)


@app.command()
def explain(
    artifact: Annotated[Path, typer.Argument(metavar="DIR", help="What `compile -o DIR` made.")],
    config: Annotated[Path, typer.Argument(help="A YAML file such as configs/smollm2-cpu.yaml.")],
    overrides: Overrides = [],  # noqa: B006
    model: Model = None,
) -> None:
    """Say what an artifact was compiled for, and where that differs from what a config needs here (then exit code 1)."""
    from compiled_llm import CompiledLLM, load_config
    from compiled_llm.runtime.artifacts.artifact import read_key

    made_for = read_key(artifact)
    if made_for is None:
        raise ValueError(
            f"{artifact} has no manifest that is whole: expected a directory that `compiled-llm compile -o` made"
        )
    no_buckets = ["buckets.decode=[]", "buckets.prefill=[]"]  # nothing is compiled for this
    with CompiledLLM.from_pretrained(
        model, config=load_config(config, [*overrides, *no_buckets])
    ) as llm:
        different = made_for.differences(llm.model_runner.fingerprint())
    for name, value in made_for.parts.items():
        print(f"{name}: {value}")
    print("\n".join(["", "different:", *different]) if different else f"\nit fits {config}")
    if different:
        raise typer.Exit(1)


@buckets_app.command()
def suggest(
    artifact: Annotated[
        Path, typer.Argument(metavar="DIR", help="An artifact that engines have run on.")
    ],
    count: Annotated[
        int | None, typer.Option(help="How many sizes of each kind; as many as now when left out.")
    ] = None,
) -> None:
    """Propose the bucket sizes that would have padded the traffic seen so far least, and say what that saves."""
    from compiled_llm.runtime.artifacts.artifact import read_traffic

    traffic = read_traffic(artifact)
    if not traffic:
        raise ValueError(
            f"{artifact} knows of no traffic: expected an artifact that an engine ran on and was closed"
        )
    for kind, seen in traffic.items():
        sizes = seen.suggest(max(1, len(seen.buckets)) if count is None else count)
        print(f"buckets.{kind}: {sizes}")
        before = (
            f"{seen.waste(seen.buckets):.1%} with {seen.buckets}"
            if seen.buckets
            else "none compiled"
        )
        print(f"  padding {seen.waste(sizes):.1%} of {sum(seen.seen.values())} steps; now {before}")


@app.command(
    add_help_option=False,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def bench(context: typer.Context) -> None:
    """Run the benchmark suite; `compiled-llm bench --help` lists its commands."""
    try:
        from bench.cli import app as suite
    except ModuleNotFoundError as error:
        if error.name not in {"bench", "bench.cli"}:
            raise
        raise ValueError(
            "the benchmark suite is not installed: run this from a checkout of the project, or install one"
        ) from None
    invoke(suite, context.args, prog_name="compiled-llm bench")


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    raise SystemExit(run_command(app, sys.argv[1:], prog_name="compiled-llm"))


if __name__ == "__main__":
    main()
