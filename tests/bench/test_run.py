"""What a run prints and saves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.display import Column
from bench.run import BenchRun, CommandResult
from tests.bench.local import local_run, tiny_config

_RESULT = CommandResult(
    command="latency",
    arguments={"rounds": 1},
    rows=[{"system": "ours", "batch": 1}],
    columns=[Column("system", "system"), Column("batch", "batch")],
    note="a note",
    details={"samples": [1.0]},
)


@pytest.fixture
def bench(tmp_path: Path) -> BenchRun:
    run = local_run(tiny_config(tmp_path))
    run.out = tmp_path / "results"
    return run


def test_finish_prints_the_record_that_it_saves(
    bench: BenchRun, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.finish(_RESULT)
    output, errors = capsys.readouterr()
    record = json.loads(output.splitlines()[-1])
    (path,) = bench.out.iterdir()
    assert json.loads(path.read_text()) == record
    assert record["command"] == "latency"
    assert record["rows"] == _RESULT.rows
    assert record["samples"] == [1.0]
    assert "latency: Tiny" in output
    assert "a note" in errors
    assert f"saved {path}" in errors


def test_finish_saves_plots_beside_the_record(bench: BenchRun) -> None:
    pytest.importorskip("matplotlib")
    bench.finish(replace(_RESULT, plots=[lambda axes: axes.plot([1, 2])]))
    assert sorted(path.suffix for path in bench.out.iterdir()) == [".json", ".png"]
