"""Charts of the documentation, drawn from records of `bench latency`."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.charts import CHARTS, RESULTS, main, model_name, newest_comparisons


def _record(
    date: str,
    systems: tuple[str, ...] = ("ours", "vllm"),
    batches: tuple[int, ...] = (1, 8),
) -> dict[str, Any]:
    rows = [
        {
            "system": system,
            "batch": batch,
            "failure": None,
            "step_ms": 0.125 * batch * (number + 1),
            "first_token_ms": 12.5 * batch * (number + 1),
        }
        for batch in batches
        for number, system in enumerate(systems)
    ]
    return {
        "command": "latency",
        "date": date,
        "arguments": {"context": 128},
        "versions": {"torch": "2.11.0"},
        "roofline": {"device_name": "NVIDIA H200", "dtype": "bfloat16", "weight_bytes": 2**30},
        "config": {"model": {"name": "configs/architectures/tiny-1b.json"}},
        "rows": rows,
        "systems": {system: {"version": "0.26.0"} for system in systems},
    }


def _write(directory: Path, *records: dict[str, Any]) -> None:
    for number, record in enumerate(records):
        (directory / f"2026-11-23-latency-tiny-{number}.json").write_text(json.dumps(record))


def test_both_variants_of_each_chart_show_the_values_of_the_record(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _write(tmp_path, _record("2026-11-23T10:00:00+00:00"))
    assert main(tmp_path, tmp_path / "images") == 0
    written = {path.name for path in (tmp_path / "images").iterdir()}
    expected = {f"{chart.name}-{theme}.svg" for chart in CHARTS for theme in ("light", "dark")}
    assert written == expected
    # Matplotlib writes each text as a comment beside its outlines.
    drawn = (tmp_path / "images" / "decode-latency-dark.svg").read_text()
    for text in ("Tiny-1B", "compiled_llm", "vLLM", "0.125", "0.250", "1.00", "2.00"):
        assert f"<!-- {text} -->" in drawn
    first = (tmp_path / "images" / "first-token-light.svg").read_text()
    assert "<!-- 12.5 -->" in first
    assert "<!-- 200 -->" in first


def test_the_newest_record_that_compares_both_systems_is_drawn(tmp_path: Path) -> None:
    newest = _record("2026-11-23T12:00:00+00:00")
    alone = _record("2026-11-23T13:00:00+00:00", systems=("ours",))
    one_batch = _record("2026-11-23T14:00:00+00:00", batches=(8,))
    _write(tmp_path, newest, _record("2026-11-23T11:00:00+00:00"), alone, one_batch)
    assert newest_comparisons(tmp_path) == [newest]


def test_records_that_name_the_roofline_card_are_drawn(tmp_path: Path) -> None:
    old = _record("2026-11-23T10:00:00+00:00")
    old["card"] = old.pop("roofline")
    _write(tmp_path, old)
    assert newest_comparisons(tmp_path) == [old]


def test_without_records_nothing_is_drawn(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(tmp_path, tmp_path / "images") == 2
    assert "expected a latency record" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


def test_saved_records_compare_two_models() -> None:
    names = [model_name(record) for record in newest_comparisons(RESULTS)]
    assert names == ["Qwen3-0.6B", "Llama-3.1-8B"]
