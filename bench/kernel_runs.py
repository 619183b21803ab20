"""`bench kernels`: runs bench/kernels.py through pytest-benchmark, and reads rates out of what it measured."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.roofline import Roofline
from bench.worker_client import ROOT


def run(card: Roofline, *, only: str | None = None) -> list[dict[str, Any]]:
    """A row for each kernel and shape: microseconds of a call, bytes and operations a second, and time against ours.

    Args:
        only: a pytest expression that chooses among the tests.

    Raises:
        ValueError: pytest ran nothing, or a kernel's output was wrong.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernels.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "bench/kernels.py",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--benchmark-json={path}",
        ]
        chosen = ["-k", only] if only else []
        done = subprocess.run(
            [*command, "--benchmark-disable-gc", *chosen], cwd=ROOT, stdout=sys.stderr
        )
        if done.returncode or not path.exists():
            raise ValueError(
                f"pytest on bench/kernels.py ended with code {done.returncode}: its output is above"
            )
        measured = json.loads(path.read_text())["benchmarks"]
    rows = [_row(each, card) for each in measured]
    for row in rows:
        ours = next(
            (
                r["us"]
                for r in rows
                if r["kernel"] == "paged" and (r["kind"], r["shape"]) == (row["kind"], row["shape"])
            ),
            None,
        )
        row["ratio"] = row["us"] / ours if ours else None
    return rows


def _row(measured: dict[str, Any], card: Roofline) -> dict[str, Any]:
    info = measured["extra_info"]
    seconds = measured["stats"]["median"] / info["calls"]
    row = {
        "kind": info["kind"],
        "shape": info["shape"],
        "kernel": info["kernel"],
        "us": seconds * 1e6,
    }
    if info["kind"] == "prefill":
        return row | {"tflops": info["flops"] / seconds / 1e12}
    rate = info["bytes"] / seconds
    return row | {"gb_per_second": rate / 1e9, "bandwidth_share": rate / card.read_bandwidth}
