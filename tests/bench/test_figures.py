"""Plots of a run."""

import sys
from pathlib import Path

import pytest

from bench.figures import bars, lines, save_figure, timelines

_ROWS = [
    {"x": 1, "y": 2.0, "s": "a"},
    {"x": 2, "y": None, "s": "b"},
    {"x": 4, "y": 3.0, "s": "a"},
]


def test_plots_are_saved_as_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    strips = [
        {"system": "a", "timeline": [(0.0, 1.0), (2.0, 3.0)]},
        {"system": "b", "timeline": []},
    ]
    draws = [
        lines(_ROWS, x="x", y="y", by="s", labels=("x", "y")),
        bars(_ROWS, x="s", ys=["y", "x"], label="y"),
        timelines(strips),
    ]
    path = save_figure(tmp_path / "plot.png", "a title", *draws)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_message_replaces_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert save_figure(tmp_path / "plot.png", "a title") is None
    assert 'pip install "compiled-llm[bench]"' in capsys.readouterr().err
    assert not (tmp_path / "plot.png").exists()
