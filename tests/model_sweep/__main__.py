"""`python -m tests.model_sweep`: every causal LM of transformers and some variants, checked, and compared with tests/model_sweep/models.yaml.

What was found is kept as it comes, under the digest of all that it depends on; a sweep that was stopped goes on where it was.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compiled_llm.system.paths import cache_dir
from passes.pipeline import source_digest
from tests.model_sweep.outcome import Outcome
from tests.model_sweep.record import HERE, ROOT, differences, read_data, to_data, totals, write
from tests.model_sweep.tiny_configs import variants
from tests.model_sweep.worker import run_apart


def main(
    types: Annotated[
        list[str] | None, typer.Argument(help="Model types and variants; all when left out.")
    ] = None,
    dispatch: Annotated[
        str,
        typer.Option(help="direct compiles; eager compiles nothing, and takes a second a type."),
    ] = "direct",
    jobs: Annotated[int, typer.Option(help="Types at a time.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds that a type may take.")] = 900.0,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Write what is found into tests/model_sweep/models.yaml and docs/models.md.",
        ),
    ] = False,
) -> None:
    """Check model types, print a table and totals; exit with 1 where one fails, or differs from tests/model_sweep/models.yaml."""
    known = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *variants()]
    names = types or known
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(
            f"transformers {version('transformers')} knows no causal LM of type {', '.join(unknown)}"
        )
    if update and dispatch != "direct":
        raise typer.BadParameter("--update takes what is found compiled: leave --dispatch out")
    outcomes = _sweep(names, dispatch, jobs, timeout)
    print(f"\n{totals(to_data(outcomes))}, of {len(outcomes)}; dispatch {dispatch}")
    if update:
        write(
            {**read_data(), **to_data(outcomes)},
            {package: version(package) for package in ("transformers", "torch")},
        )
    wrong = differences(outcomes, read_data())
    if wrong:
        print("\n".join(["", "not as tests/model_sweep/models.yaml says:", *wrong]))
        raise typer.Exit(1)


def _sweep(names: list[str], dispatch: str, jobs: int, timeout: float) -> dict[str, Outcome]:
    directory = cache_dir() / "sweep" / f"{_digest()}-{dispatch}"
    directory.mkdir(parents=True, exist_ok=True)
    run = partial(_run, directory=directory, dispatch=dispatch, timeout=timeout)
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = {}
        for name, outcome in zip(names, pool.map(run, names), strict=True):
            said = (
                f"{outcome.difference:.1e}  {outcome.exercised}"
                if outcome.status == "works"
                else outcome.reason
            )
            print(f"{name:26} {outcome.status:12} {said}", flush=True)
            outcomes[name] = outcome
    return outcomes


def _run(name: str, *, directory: Path, dispatch: str, timeout: float) -> Outcome:
    kept = directory / f"{name}.json"
    if kept.exists():
        return Outcome(**json.loads(kept.read_text()))
    outcome = run_apart(name, dispatch, timeout=timeout, log=directory / f"{name}.log")
    if outcome.status != "fails":
        kept.write_text(json.dumps(outcome.to_dict()))
    return outcome


def _digest() -> str:
    """Changes with all that a result depends on: our source, the sweep's, and transformers."""
    folders = [
        source_digest(ROOT / folder)[:8]
        for folder in ("compiled_llm", "passes", "tests/model_sweep")
    ]
    overrides = (HERE / "overrides.yaml").read_bytes() + (
        HERE / "known_unsupported.yaml"
    ).read_bytes()
    return "-".join(
        [
            version("transformers"),
            version("torch"),
            *folders,
            hashlib.sha256(overrides).hexdigest()[:8],
        ]
    )


if __name__ == "__main__":
    typer.run(main)
