"""Records: names of files, versions, and the roofline's entry."""

import json
from pathlib import Path

import pytest

from bench.record import RESULTS, make_record, model_name, roofline_of, save_record
from compiled_llm.config.loader import parse_config
from tests.bench.local import fake_roofline


def test_records_are_dated_files_that_replace_none(tmp_path: Path) -> None:
    config = parse_config({"model": {"name": "Qwen/Qwen3-0.6B"}})
    record = make_record("latency", config, fake_roofline(), {"rounds": 1}, {"rows": []})
    paths = [save_record(record, tmp_path / "results", model_name(config)) for _ in range(2)]
    stem = f"{record['date'][:10]}-latency-qwen3-0.6b"
    assert [path.name for path in paths] == [f"{stem}.json", f"{stem}-2.json"]
    saved = json.loads(paths[1].read_text())
    assert saved == record
    assert saved["roofline"]["ceiling_tokens_per_second"] == 250
    packages = {"torch", "triton", "transformers"}
    assert packages | {"driver", "commit", "python"} <= saved["versions"].keys()
    assert saved["config"]["model"]["name"] == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, "smollm2-135m-instruct"),
        ("configs/architectures/llama-3.1-8b.json", "llama-3.1-8b"),
        ("models/My Model/config.json", "my-model"),
        ("models/smollm2.gguf", "smollm2"),
    ],
)
def test_model_name_comes_from_the_path(name: str | None, expected: str) -> None:
    assert model_name(parse_config({"model": {"name": name}})) == expected


def test_commit_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "abc123")
    record = make_record("latency", parse_config({}), fake_roofline(), {}, {})
    assert record["versions"]["commit"] == "abc123"


def test_all_saved_results_have_a_roofline() -> None:
    paths = list(RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        assert roofline_of(json.loads(path.read_text()))["device_name"]
