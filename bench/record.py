"""What is kept of a run: versions, a dated JSON file, and the same object as the last line printed."""

import datetime
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.roofline import Roofline
from bench.worker_client import ROOT
from compiled_llm.config.schema import Config

RESULTS = ROOT / "bench" / "results"


def make_record(
    command: str, config: Config, card: Roofline, arguments: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    """All that is needed to read a result later: when, with what, on what, and what came out."""
    return {
        "command": command,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "arguments": arguments,
        "versions": versions(),
        "card": {**asdict(card), "ceiling_tokens_per_second": card.ceiling},
        "config": config.model_dump(mode="json"),
        **result,
    }


def save(record: dict[str, Any], directory: Path, name: str) -> Path:
    """Write `YYYY-MM-DD-<command>-<name>.json`, with a number where that exists; returns the path."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{record['date'][:10]}-{record['command']}-{name}"
    path, number = directory / f"{stem}.json", 2
    while path.exists():
        path, number = directory / f"{stem}-{number}.json", number + 1
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def model_name(config: Config) -> str:
    """A short name for files: of the architecture's file, the directory or the hub id."""
    if config.model.name is None:
        return "smollm2-135m-instruct"
    path = Path(config.model.name)
    name = path.parent.name if path.name == "config.json" else path.name
    return name.removesuffix(".json").removesuffix(".gguf").lower().replace(" ", "-")


def versions() -> dict[str, str | None]:
    """Of what a figure depends on; None where it is not there."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "commit": _commit(),
        "driver": _driver(),
    }
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """As BENCH_COMMIT says, where the tree is a copy without its history; else git's."""
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
