"""Commands from end to end, with worker processes, and errors for bad input."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bench import kernel_runs
from bench.cli import app
from compiled_llm.cli.main import app as main_app
from tests.bench.local import fake_roofline, tiny_config
from tests.conftest import DEVICE


def _write(directory: Path) -> str:
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(directory).model_dump(mode="json")))
    return str(path)


def test_latency_from_end_to_end(tmp_path: Path) -> None:
    """`compiled-llm bench latency` prints the record that it saves as its last line."""
    out = tmp_path / "results"
    sizes = ["--batch", "1,4", "--context", "16", "--steps", "4", "--rounds", "2"]
    systems = ["--systems", "ours-eager,transformers"]
    files = ["--config", _write(tmp_path), "--out", str(out)]
    done = CliRunner().invoke(main_app, ["bench", "latency", *systems, *sizes, *files])
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
    assert record["roofline"]["kv_bytes"] == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["latency", "--systems", "ours,theirs"],
            "unknown system theirs: expected some of ours, ours-eager, ours-torch, transf",
        ),
        (
            ["latency", "--batch", "1,x"],
            "--batch '1,x': expected positive numbers separated by commas",
        ),
        (
            ["throughput", "--prompt-lengths", "9-3"],
            "--prompt-lengths '9-3': expected two numbers, smallest first",
        ),
        (["stream", "--systems", "transformers"], "expected some of ours, ours-eager, ours-torch"),
    ],
)
def test_bad_input_is_an_error(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the sizes are those of real models")
def test_kernels_are_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest-benchmark disables itself in a worker of pytest-xdist.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    rows = kernel_runs.measure(fake_roofline(), only="sdpa or paged")
    assert [(row["kind"], row["kernel"]) for row in rows] == [
        (kind, kernel) for kind in ("decode", "prefill") for kernel in ("paged", "sdpa")
    ]
    assert all(row["gb_per_second"] > 0 for row in rows if row["kind"] == "decode")
    assert all(row["ratio"] > 0 for row in rows)
