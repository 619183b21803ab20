"""The cache of artifacts: eviction of the least recently used."""

import os
import time
from pathlib import Path

import pytest

from compiled_llm.runtime.artifacts import artifact as artifact_module
from compiled_llm.runtime.artifacts import cache
from compiled_llm.runtime.artifacts.artifact import Artifact
from compiled_llm.system import atomic_file
from tests.helpers.artifacts import KEY, saved


def _cached(name: str, *, size: int, age: float) -> Path:
    artifact = Artifact(cache.cached_artifacts() / name, KEY)
    artifact.save("decode-1-greedy", saved(b"x" * size))
    os.utime(artifact.directory / "manifest.json", (time.time() - age, time.time() - age))
    return artifact.directory


def test_the_least_recently_used_artifacts_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path))
    monkeypatch.setattr(artifact_module, "_loaded_libraries", list)  # those of other tests
    used, old, older, oldest = (
        _cached(name, size=100_000, age=n)
        for n, name in enumerate(["used", "old", "older", "oldest"])
    )
    assert cache.remove_lru(410_000, used=used) == []
    cache.mark_used(oldest)
    with atomic_file.locked(older):
        assert cache.remove_lru(210_000, used=used) == ["old", "oldest"], (
            "another process writes to older"
        )
    assert [path.name for path in sorted(cache.cached_artifacts().iterdir())] == [
        "older",
        "used",
    ]
    assert cache.remove_lru(1, used=used) == ["older"]
    assert Artifact(used, KEY).load("decode-1-greedy") is not None
    assert cache.remove_lru(1, used=tmp_path / "named") == [], "the engine is on another directory"
    assert not old.exists()


def test_eviction_does_not_follow_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artifact_module, "_loaded_libraries", list)
    used, link = _cached("used", size=1000, age=0), cache.cached_artifacts() / "link"
    elsewhere = Artifact(tmp_path / "elsewhere", KEY)
    elsewhere.save("decode-1-greedy", saved(b"x" * 1000))
    link.symlink_to(elsewhere.directory)
    before = {path: path.read_bytes() for path in elsewhere.directory.iterdir()}
    os.utime(elsewhere.directory / "manifest.json", (0, 0))
    assert cache.remove_lru(1, used=used) == []
    assert link.is_symlink()
    assert {path: path.read_bytes() for path in elsewhere.directory.iterdir()} == before
