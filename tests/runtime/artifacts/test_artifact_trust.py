"""Artifacts that other users could change are not loaded."""

import os
from pathlib import Path

import pytest

from compiled_llm.report.report import Report
from compiled_llm.runtime.artifacts import cache
from compiled_llm.runtime.artifacts.artifact import Artifact
from tests.helpers.artifacts import KEY, saved
from tests.helpers.tiny_models import small_config


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    (tmp_path / "a").mkdir(mode=0o700)
    (tmp_path / "a" / ".lock").symlink_to(tmp_path / "letter")
    with pytest.raises(OSError, match="symbolic links"):
        Artifact(tmp_path / "a", KEY).save("decode-1-greedy", saved(b"one"))
    assert (tmp_path / "letter").read_text() == "dear"


def test_created_files_are_private(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        Artifact(tmp_path / "a" / "b", KEY).save("decode-1-greedy", saved(b"one"))
    finally:
        os.umask(umask)
    made = [tmp_path / "a", *(tmp_path / "a").rglob("*")]
    assert {path.name: path.stat().st_mode & 0o077 for path in made} == dict.fromkeys(
        (path.name for path in made), 0
    )
    assert {"b", "manifest.json", "decode-1-greedy.bucket"} <= {path.name for path in made}


@pytest.mark.parametrize("place", [".", "manifest.json", "decode-1-greedy.bucket"])
def test_a_file_that_others_may_write_is_not_loaded(tmp_path: Path, place: str) -> None:
    noticed: list[str] = []
    artifact = Artifact(tmp_path / "a", KEY, noticed.append)
    artifact.save("decode-1-greedy", saved(b"one"))
    os.chmod(artifact.directory / place, 0o770)
    found = [str(artifact.incompatibility()), *noticed]
    assert artifact.load("decode-1-greedy") is None or place != "decode-1-greedy.bucket"
    (said,) = [line for line in [*found, *noticed] if "others may write to" in line][:1]
    assert f"others may write to {(artifact.directory / place).resolve()} (mode 770)" in said
    os.chmod(artifact.directory / place, 0o700)
    assert artifact.incompatibility() is None
    assert artifact.load("decode-1-greedy") == saved(b"one")


def test_an_artifact_that_others_may_write_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shared").mkdir()
    os.chmod(tmp_path / "shared", 0o777)
    config, report = small_config(compile={"artifact": str(tmp_path / "shared" / "new")}), Report()
    opened = cache.open_artifact(config, KEY, report, by_graph=False)
    assert f"not used: others may write to {tmp_path}/shared (mode 777)" in caplog.text
    assert opened is not None
    assert opened.directory.parent == tmp_path / "cache" / "artifacts"
    assert [report.startup.artifact_refusal] == report.warnings

    (tmp_path / "cache").mkdir()
    os.chmod(tmp_path / "cache", 0o777)
    auto = small_config(compile={"artifact": "auto"})
    assert cache.open_artifact(auto, KEY, Report(), by_graph=False) is None
    assert f"not used: others may write to {tmp_path}/cache" in caplog.text
