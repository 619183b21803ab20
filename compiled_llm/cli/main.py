"""The command line, a thin layer over the Python API.

Modules that import torch are imported inside the commands, so that `--help` answers at once. Bad
input is one line on standard error and exit status 2 (see `exit_status`).
"""

import sys
from functools import partial
from typing import Annotated

import typer

from compiled_llm.cli import artifact_commands
from compiled_llm.cli.exit_status import invoke, run_command
from compiled_llm.cli.options import (
    ConfigFile,
    Model,
    Overrides,
    PromptsFile,
    ReportFile,
    ResultsFile,
    StopTexts,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Run Hugging Face causal language models as compiled, paged inference engines.",
)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="A prompt, for a single completion.")] = None,
    prompts: PromptsFile = None,
    out: ResultsFile = None,
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="Divisor of the logits; 0 is greedy sampling.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the fewest most likely tokens with this total probability."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Sample from this many most likely tokens; 0 is all.")
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(help="Sample from tokens of this probability, relative to the most likely."),
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling; random without it.")] = None,
    stop: StopTexts = [],  # noqa: B006
    n: Annotated[
        int, typer.Option("--n", help="Completions of each prompt; only with --prompts.")
    ] = 1,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Complete the text as it is, without the model's chat template."
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="Print the engine's report to standard error at the end."),
    ] = False,
    report_file: ReportFile = None,
) -> None:
    """Complete a prompt, or all prompts of a file.

    A PROMPT's text is printed while it is generated.

    A line of --prompts is a JSON string, or an object with "prompt" (text or token ids) or
    "messages", and optionally "id" and "params" (fields of SamplingParams). A line of --out is
    written when its prompt is complete; run the same command again to resume an interrupted run.
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
        typer.Argument(
            help="A directory, a hub id or a .gguf file; without it, the model of the config."
        ),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    start: Annotated[
        bool,
        typer.Option(
            "--start", help="Start an engine and print its phases, buckets, passes and fallbacks."
        ),
    ] = False,
    report_file: ReportFile = None,
) -> None:
    """Show how an engine would run a model, or why it would refuse the model.

    Only the model's config is read, unless --start or --report-file is given.
    """
    from compiled_llm import CompiledLLM, load_config
    from compiled_llm.cli.inspect import inspect_model
    from compiled_llm.report.export import check_report_path, output_report

    check_report_path(report_file)
    named = [] if model is None else [f"model.name={model}"]
    settings = load_config(config, [*overrides, *named])
    if not start and report_file is None:
        print(inspect_model(settings))
        return
    with CompiledLLM.from_pretrained(config=settings) as llm:
        print(llm.report())
        output_report(llm.report(), printed=False, file=report_file)


app.command("compile")(artifact_commands.compile_buckets)
app.command()(artifact_commands.verify)
app.command()(artifact_commands.explain)

buckets_app = typer.Typer(no_args_is_help=True, help="Commands for the sizes of buckets.")
buckets_app.command()(artifact_commands.suggest)
app.add_typer(buckets_app, name="buckets")


@app.command(
    add_help_option=False,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def bench(context: typer.Context) -> None:
    """Run a benchmark; `compiled-llm bench --help` lists them."""
    try:
        from bench.cli import app as suite
    except ModuleNotFoundError as error:
        if error.name not in {"bench", "bench.cli"}:
            raise
        raise ValueError(
            "the benchmarks are not installed: run this from a checkout of the project, or "
            "install one"
        ) from None
    invoke(suite, context.args, prog_name="compiled-llm bench")


def main() -> None:
    """Run the command of the process's arguments and exit with its status."""
    raise SystemExit(run_command(app, sys.argv[1:], prog_name="compiled-llm"))


if __name__ == "__main__":
    main()
