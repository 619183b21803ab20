"""`bench kernels`: runs bench/kernels.py with pytest-benchmark and computes rates."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.display import Column, number, percent, times
from bench.figures import bars
from bench.roofline import Roofline
from bench.run import BenchRun, CommandResult
from bench.worker_client import ROOT

_COLUMNS = (
    Column("kind", "kind"),
    Column("sequences x tokens - heads", "shape"),
    Column("kernel", "kernel"),
    Column("us", "us", number(2)),
    Column("x paged", "ratio", times),
    Column("GB/s", "gb_per_second", number(1)),
    Column("of the read bandwidth", "bandwidth_share", percent),
    Column("TFLOP/s", "tflops", number(2)),
)


def run(bench: BenchRun, *, only: str | None) -> None:
    """Run the command; `only` is a pytest expression that selects tests."""
    rows = measure(bench.roofline, only=only)
    decode = [
        {**row, "label": f"{row['shape']} {row['kernel']}"}
        for row in rows
        if row["kind"] == "decode"
    ]
    label = "GB/s of keys and values, decode"
    bench.finish(
        CommandResult(
            command="kernels",
            arguments={"only": only},
            rows=rows,
            columns=_COLUMNS,
            plots=[bars(decode, x="label", ys=["gb_per_second"], label=label)] if decode else [],
        )
    )


def measure(roofline: Roofline, *, only: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each kernel and shape, with its time relative to our kernel.

    Raises:
        ValueError: pytest ran no test, or a kernel's output was wrong.
    """
    rows = [_row(each, roofline) for each in _run_pytest(only)]
    ours = {(row["kind"], row["shape"]): row["us"] for row in rows if row["kernel"] == "paged"}
    for row in rows:
        base = ours.get((row["kind"], row["shape"]))
        row["ratio"] = row["us"] / base if base else None
    return rows


def _run_pytest(only: str | None) -> list[dict[str, Any]]:
    """Return the benchmarks in the JSON file that pytest-benchmark writes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernels.json"
        command = [sys.executable, "-m", "pytest", "bench/kernels.py", "-q"]
        options = ["-p", "no:cacheprovider", f"--benchmark-json={path}", "--benchmark-disable-gc"]
        selected = ["-k", only] if only else []
        done = subprocess.run([*command, *options, *selected], cwd=ROOT, stdout=sys.stderr)
        if done.returncode or not path.exists():
            raise ValueError(
                f"pytest on bench/kernels.py ended with code {done.returncode}; "
                "its output is above, and -k must select at least one test"
            )
        benchmarks: list[dict[str, Any]] = json.loads(path.read_text())["benchmarks"]
    return benchmarks


def _row(measured: dict[str, Any], roofline: Roofline) -> dict[str, Any]:
    info = measured["extra_info"]
    seconds = measured["stats"]["median"] / info["calls"]
    row = {name: info[name] for name in ("kind", "shape", "kernel")} | {"us": seconds * 1e6}
    if info["kind"] == "prefill":
        return row | {"tflops": info["flops"] / seconds / 1e12}
    rate = info["bytes"] / seconds
    return row | {"gb_per_second": rate / 1e9, "bandwidth_share": rate / roofline.read_bandwidth}
