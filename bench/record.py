"""Record of a run: everything needed to read its result later, as a dated JSON file."""

import datetime
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.worker_client import ROOT

if TYPE_CHECKING:  # torch takes seconds to import, and the charts need records only
    from bench.roofline import Roofline
    from compiled_llm.config.schema import Config

RESULTS = ROOT / "bench" / "results"


def make_record(
    command: str,
    config: "Config",
    roofline: "Roofline",
    arguments: dict[str, Any],
    result: dict[str, Any],
) -> dict[str, Any]:
    """Return a record: command, date, versions, config, roofline and the entries of `result`."""
    return {
        "command": command,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "arguments": arguments,
        "versions": versions(),
        "roofline": {**asdict(roofline), "ceiling_tokens_per_second": roofline.ceiling},
        "config": config.model_dump(mode="json"),
        **result,
    }


def roofline_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the roofline's fields in a record; older records name it `card`."""
    fields: dict[str, Any] = record["roofline"] if "roofline" in record else record["card"]
    return fields


def save_record(record: dict[str, Any], directory: Path, name: str) -> Path:
    """Write a record to `YYYY-MM-DD-<command>-<name>.json` and return the path.

    A number is appended to the name of the file if it exists.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{record['date'][:10]}-{record['command']}-{name}"
    path, number = directory / f"{stem}.json", 2
    while path.exists():
        path, number = directory / f"{stem}-{number}.json", number + 1
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def model_name(config: "Config") -> str:
    """Return a short name for files, taken from the model's file, directory or hub id."""
    if config.model.name is None:
        return "smollm2-135m-instruct"
    path = Path(config.model.name)
    name = path.parent.name if path.name == "config.json" else path.name
    return name.removesuffix(".json").removesuffix(".gguf").lower().replace(" ", "-")


def versions() -> dict[str, str | None]:
    """Return the versions of everything that a result depends on; None for what is missing."""
    installed: dict[str, str | None] = {
        "python": platform.python_version(),
        "commit": _commit(),
        "driver": _driver(),
    }
    for package in ("torch", "triton", "transformers"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def _commit() -> str | None:
    """Return git's commit, or BENCH_COMMIT, which is set for a copy of the tree without history."""
    if os.environ.get("BENCH_COMMIT"):
        return os.environ["BENCH_COMMIT"]
    head = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}{'-changed' if changed else ''}" if head else None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _output(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
