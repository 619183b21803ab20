"""Tables on the terminal."""

import pytest

from bench.display import Column, number, percent, show_roofline, show_table, times
from tests.bench.local import fake_roofline

_COLUMNS = [Column("system", "system"), Column("batch", "batch"), Column("ms", "ms", number(2))]


def test_formats() -> None:
    assert number(1)(12345.67) == "12,345.7"
    assert percent(0.125) == "12.5%"
    assert times(1.5) == "1.50x"


def test_empty_columns_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [*_COLUMNS, Column("host us", "host_us", number(1))]
    show_table("a title", columns, [{"system": "ours", "batch": 1, "ms": 2.5}])
    shown = capsys.readouterr().out
    assert "a title" in shown
    assert "2.50" in shown
    assert "host us" not in shown


def test_failures_stand_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"system": "ours", "batch": 1, "ms": 2.5},
        {"system": "vllm", "batch": 1, "failure": "no device"},
        {"system": "vllm", "batch": 8, "failure": "no device"},
    ]
    show_table("a title", _COLUMNS, rows)
    assert capsys.readouterr().out.strip().endswith("vllm: no device (batch 1, 8)")


def test_roofline_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show_roofline(fake_roofline())
    assert "250 tokens/s (4.0000 ms per step)" in capsys.readouterr().out
