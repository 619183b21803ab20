"""Engines whose buckets cannot be saved: a warning, and the same tokens."""

import errno
from pathlib import Path

import pytest

from compiled_llm.runtime.capture import warmup
from compiled_llm.system import atomic_file
from tests.runtime.artifacts.engines import run


def test_a_step_that_cannot_be_serialized_is_not_saved_and_runs(
    expected: list[list[int]],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(compiled: object) -> bytes:
        raise TypeError("cannot pickle this")

    monkeypatch.setattr(warmup, "serialize", refuse)
    report = run(tmp_path, expected, checkpoint, buckets={"decode": [], "prefill": [48]})
    assert "1 of 1 buckets were compiled and not saved" in caplog.text
    assert "cannot pickle this" in caplog.text
    (warning,) = report.warnings
    assert "could not be saved" in warning
    assert "cannot pickle this" in warning
    assert [bucket.failure for bucket in report.buckets] == [None]


def test_a_full_disk_leaves_the_engine_usable(
    expected: list[list[int]],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_file.os, "fsync", full)
    report = run(tmp_path / "full", expected, checkpoint, buckets={"decode": [], "prefill": [48]})
    assert "1 of 1 buckets were compiled and not saved" in caplog.text
    assert "No space left on device" in caplog.text
    assert [bucket.save_failure for bucket in report.buckets] == report.warnings
    (warning,) = report.warnings
    assert "could not be saved" in warning
    assert "No space left" in warning
    assert not [path for path in (tmp_path / "full").iterdir() if path.name != ".lock"]
