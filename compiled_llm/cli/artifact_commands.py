"""The commands that make, check and read artifacts: compile, verify, explain, buckets suggest."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compiled_llm.cli.options import Config, Model, Overrides, ReportFile

if TYPE_CHECKING:  # imports torch
    from compiled_llm.report.report import Report


def compile_buckets(
    config: Config,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="The directory to save to; one in the cache directory without it.",
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    model: Model = None,
    report_file: ReportFile = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the artifact in DIR, whatever it was made for.")
    ] = False,
) -> None:
    """Compile all buckets of a config and save them for later starts.

    An engine loads them with `--set compile.artifact=DIR`, or on its own from the cache directory.
    """
    from compiled_llm import CompiledLLM, load_config
    from compiled_llm.report.export import check_report_path, output_report
    from compiled_llm.runtime.artifacts.artifact import discard

    check_report_path(report_file)
    if out is not None and force:
        discard(out)
    settings = load_config(config, overrides)
    with CompiledLLM.from_pretrained(model, config=settings, artifact=out) as llm:
        report = llm.report()
    print(report)
    output_report(report, printed=False, file=report_file)
    _check_saved(report, out)


def _check_saved(report: "Report", out: Path | None) -> None:
    """Raise a ValueError unless all buckets were saved, to `out` where that is given."""
    refusal = report.startup.artifact_refusal
    saved_in = report.facts.get("artifact")
    if saved_in is None:
        expected = "expected compile.dispatch=direct, no compile.dump, and compile.artifact not off"
        raise ValueError(f"nothing was saved: {refusal or expected}")
    if out is not None and saved_in != str(out):
        raise ValueError(
            f"{refusal}; choose another directory, or replace its contents with --force"
        )
    missing = [
        bucket.save_failure or bucket.bucket
        for bucket in report.buckets
        if bucket.failure is None and not bucket.saved
    ]
    if missing:
        raise ValueError(f"{len(missing)} buckets could not be saved: {'; '.join(missing)}")


def verify(
    config: Config,
    overrides: Overrides = [],  # noqa: B006
    model: Model = None,
) -> None:
    """Compare all buckets of a config with eager on random batches.

    The exit status is 1 if a bucket differs.
    """
    from compiled_llm import CompiledLLM, load_config

    # Without strict, a bucket that differs does not end the comparison of the others.
    settings = load_config(config, [*overrides, "verify=true", "strict=false"])
    with CompiledLLM.from_pretrained(model, config=settings) as llm:
        report = llm.report()
    print(report.render_verification())
    if any(bucket.failure for bucket in report.buckets):
        raise typer.Exit(1)


def explain(
    artifact: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory made by `compile -o DIR`.")
    ],
    config: Config,
    overrides: Overrides = [],  # noqa: B006
    model: Model = None,
) -> None:
    """Show what an artifact was compiled for and whether a config can use it here.

    The exit status is 1 if it cannot.
    """
    from compiled_llm import CompiledLLM, load_config
    from compiled_llm.runtime.artifacts.artifact import read_key

    made_for = read_key(artifact)
    if made_for is None:
        raise ValueError(
            f"{artifact} has no complete manifest: expected a directory made by "
            "`compiled-llm compile -o`"
        )
    no_buckets = ["buckets.decode=[]", "buckets.prefill=[]"]  # so that nothing is compiled
    settings = load_config(config, [*overrides, *no_buckets])
    with CompiledLLM.from_pretrained(model, config=settings) as llm:
        different = made_for.differences(llm.model_runner.fingerprint())
    for name, value in made_for.parts.items():
        print(f"{name}: {value}")
    print("\n".join(["", "different:", *different]) if different else f"\nit fits {config}")
    if different:
        raise typer.Exit(1)


def suggest(
    artifact: Annotated[
        Path, typer.Argument(metavar="DIR", help="An artifact that engines have used.")
    ],
    count: Annotated[
        int | None,
        typer.Option(help="How many sizes of each kind; without it, as many as now."),
    ] = None,
) -> None:
    """Suggest the bucket sizes that pad the recorded traffic of an artifact least."""
    from compiled_llm.runtime.artifacts.artifact import read_traffic

    traffic = read_traffic(artifact)
    if not traffic:
        raise ValueError(
            f"{artifact} has no record of traffic: expected an artifact that an engine has used "
            "and closed"
        )
    for kind, recorded in traffic.items():
        sizes = recorded.suggest(max(1, len(recorded.buckets)) if count is None else count)
        print(f"buckets.{kind}: {sizes}")
        before = "none compiled"
        if recorded.buckets:
            before = f"{recorded.waste(recorded.buckets):.1%} with {recorded.buckets}"
        num_steps = sum(recorded.seen.values())
        print(f"  padding {recorded.waste(sizes):.1%} of {num_steps} steps; now {before}")
