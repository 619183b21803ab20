"""`python -m tests.model_sweep`: check every causal LM of transformers, and some variants.

Results are cached under a digest of everything that they depend on, so that an interrupted sweep
continues where it stopped.
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
from tests.model_sweep.record import (
    HERE,
    ROOT,
    differences,
    read_data,
    to_data,
    totals,
    write_record,
)
from tests.model_sweep.result import ModelResult
from tests.model_sweep.tiny_configs import variants
from tests.model_sweep.worker import check_in_subprocess

Types = Annotated[
    list[str] | None, typer.Argument(help="Model types and variants; all by default.")
]
Dispatch = Annotated[
    str, typer.Option(help="direct compiles; eager does not, and takes a second per type.")
]
Jobs = Annotated[int, typer.Option(help="Number of types to check at a time.")]
Timeout = Annotated[float, typer.Option(help="Maximum seconds of one type.")]
Update = Annotated[
    bool,
    typer.Option(
        "--update", help="Write the results to tests/model_sweep/models.yaml and docs/models.md."
    ),
]


def main(
    types: Types = None,
    dispatch: Dispatch = "direct",
    jobs: Jobs = 2,
    timeout: Timeout = 900.0,
    update: Update = False,
) -> None:
    """Check model types; exit with 1 if one fails or differs from the recorded results."""
    known = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *variants()]
    names = types or known
    if unknown := [name for name in names if name not in known]:
        installed = f"transformers {version('transformers')}"
        raise typer.BadParameter(f"{installed} has no causal LM of type {', '.join(unknown)}")
    if update and dispatch != "direct":
        raise typer.BadParameter("--update records compiled results: leave --dispatch out")
    results = _sweep(names, dispatch, jobs, timeout)
    print(f"\n{totals(to_data(results))}, of {len(results)}; dispatch {dispatch}")
    if update:
        versions = {package: version(package) for package in ("transformers", "torch")}
        write_record({**read_data(), **to_data(results)}, versions)
    wrong = differences(results, read_data())
    if wrong:
        print("\n".join(["", "different from tests/model_sweep/models.yaml:", *wrong]))
        raise typer.Exit(1)


def _sweep(names: list[str], dispatch: str, jobs: int, timeout: float) -> dict[str, ModelResult]:
    directory = cache_dir() / "sweep" / f"{_digest()}-{dispatch}"
    directory.mkdir(parents=True, exist_ok=True)
    run = partial(_check_cached, directory=directory, dispatch=dispatch, timeout=timeout)
    results = {}
    with ThreadPoolExecutor(jobs) as pool:
        for name, result in zip(names, pool.map(run, names), strict=True):
            print(f"{name:26} {result.status:12} {result}", flush=True)
            results[name] = result
    return results


def _check_cached(name: str, *, directory: Path, dispatch: str, timeout: float) -> ModelResult:
    path = directory / f"{name}.json"
    if path.exists():
        return ModelResult(**json.loads(path.read_text()))
    log = directory / f"{name}.log"
    result = check_in_subprocess(name, dispatch, timeout=timeout, log=log)
    if result.status != "fails":
        path.write_text(json.dumps(result.to_dict()))
    return result


def _digest() -> str:
    """Return a digest of everything that a result depends on: packages, source and data."""
    folders = ("compiled_llm", "passes", "tests/model_sweep")
    sources = [source_digest(ROOT / folder)[:8] for folder in folders]
    files = ("overrides.yaml", "known_unsupported.yaml")
    data = hashlib.sha256(b"".join((HERE / file).read_bytes() for file in files))
    return "-".join([version("transformers"), version("torch"), *sources, data.hexdigest()[:8]])


if __name__ == "__main__":
    typer.run(main)
