"""The commands from end to end, with real processes, and how they refuse bad input."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bench import kernel_runs
from bench.cli import app
from compiled_llm.cli.main import app as main_app
from tests.bench.local import made_up_card, tiny_config
from tests.conftest import DEVICE


def _write(directory: Path) -> str:
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(directory).model_dump(mode="json")))
    return str(path)


def test_latency_from_end_to_end(tmp_path: Path) -> None:
    """Through `compiled-llm bench`: a card, a table, a plot, a file, and the same object as the last line."""
    arguments = [
        "--config",
        _write(tmp_path),
        "--systems",
        "ours-eager,transformers",
        "--batch",
        "1,4",
        "--context",
        "16",
    ]
    out = tmp_path / "results"
    done = CliRunner().invoke(
        main_app,
        ["bench", "latency", *arguments, "--steps", "4", "--rounds", "2", "--out", str(out)],
    )
    assert done.exit_code == 0, done.output
    assert "ceiling at batch 1" in done.stdout
    record = json.loads(done.stdout.strip().splitlines()[-1])
    (path,) = out.glob("*-latency-tiny.json")
    assert json.loads(path.read_text()) == record
    assert [(row["system"], row["batch"]) for row in record["rows"]] == [
        (system, batch) for batch in (1, 4) for system in ("ours-eager", "transformers")
    ]
    assert all(row["first_token_ms"] > 0 and row["failure"] is None for row in record["rows"])
    assert all(len(sample["step_ms"]) == 2 for sample in record["samples"])
    assert record["systems"]["transformers"]["attention"] == "sdpa"
    assert record["reports"]["ours-eager"]["fallbacks"]
    assert record["card"]["kv_bytes"] == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["latency", "--systems", "ours,theirs"],
            "unknown system theirs: expected some of ours, ours-eager, ours-torch, transf",
        ),
        (["latency", "--batch", "1,x"], "--batch '1,x': expected positive numbers with commas"),
        (
            ["throughput", "--prompt-lengths", "9-3"],
            "--prompt-lengths '9-3': expected two numbers, the smaller first",
        ),
        (["stream", "--systems", "transformers"], "expected some of ours, ours-eager, ours-torch"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the sizes are those of real models")
def test_kernels_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(
        "PYTEST_XDIST_WORKER", raising=False
    )  # pytest-benchmark does not measure beside other tests
    rows = kernel_runs.run(made_up_card(), only="sdpa or paged")
    assert [(row["kind"], row["kernel"]) for row in rows] == [
        (kind, kernel) for kind in ("decode", "prefill") for kernel in ("paged", "sdpa")
    ]
    assert all(row["gb_per_second"] > 0 for row in rows if row["kind"] == "decode")
    assert all(row["ratio"] > 0 for row in rows)
