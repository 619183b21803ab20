"""Artifacts: buckets are saved, loaded for their key only, and checked for damage."""

import shutil
from pathlib import Path

import pytest

from compiled_llm.runtime.artifacts import artifact as artifact_module
from compiled_llm.runtime.artifacts.artifact import Artifact, discard, read_key
from tests.helpers.artifacts import KEY, OTHER, saved


def test_a_saved_bucket_is_loaded(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "a", KEY)
    assert artifact.load("decode-1-greedy") is None
    assert artifact.incompatibility() is None
    artifact.save("decode-1-greedy", saved(b"one"))
    artifact.save("decode-2-greedy", saved(b"two"))
    artifact.save("decode-1-greedy", saved(b"three"))
    assert artifact.load("decode-1-greedy") == saved(b"three")
    assert artifact.load("decode-2-greedy") == saved(b"two")
    assert artifact.incompatibility() is None
    moved = Artifact(Path(shutil.move(artifact.directory, tmp_path / "b")), KEY)
    assert moved.load("decode-2-greedy") == saved(b"two")


def test_another_key_loads_nothing_and_names_the_differences(tmp_path: Path) -> None:
    Artifact(tmp_path, KEY).save("decode-1-greedy", saved(b"one"))
    other = Artifact(tmp_path, OTHER)
    assert other.load("decode-1-greedy") is None
    incompatibility = other.incompatibility()
    assert incompatibility is not None
    assert "model: a; here: b, dtype: nothing; here: float32" in incompatibility
    assert "torch" not in incompatibility
    other.save("decode-2-greedy", saved(b"two"))
    assert other.load("decode-1-greedy") is None, "what was compiled for another key is gone"
    assert Artifact(tmp_path, KEY).load("decode-1-greedy") is None
    discard(tmp_path)
    assert read_key(tmp_path) is None
    assert other.incompatibility() is None


def test_other_files_in_the_directory_stay(tmp_path: Path) -> None:
    """The configured directory may hold other files."""
    others = [
        tmp_path / name
        for name in ("a.so", "venv/b.so", "venv/c.bucket", "libraries/d.so", "e.bucket")
    ]
    for name in ("venv", "libraries"):
        (tmp_path / name).mkdir()
    for path in others:
        path.write_bytes(b"not ours")
    Artifact(tmp_path, KEY).save("decode-1-greedy", saved(b"one"))
    Artifact(tmp_path, OTHER).save("decode-2-greedy", saved(b"two"))
    assert all(path.read_bytes() == b"not ours" for path in others)
    assert sorted(path.name for path in tmp_path.glob("*.bucket")) == [
        "decode-2-greedy.bucket",
        "e.bucket",
    ]


def test_any_changed_byte_is_detected(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, KEY)
    artifact.save("decode-1-greedy", saved(b"one"))
    (bucket,) = tmp_path.glob("*.bucket")
    manifest = tmp_path / "manifest.json"
    for path in (bucket, manifest):
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert artifact.load("decode-1-greedy") is None or (
                path == manifest and read_key(tmp_path) == KEY
            )
            path.write_bytes(whole[:place])
            assert artifact.load("decode-1-greedy") is None
        path.write_bytes(whole)
    assert artifact.load("decode-1-greedy") == saved(b"one")


def test_a_damaged_manifest_is_replaced_and_a_foreign_one_is_not(tmp_path: Path) -> None:
    noticed: list[str] = []
    artifact = Artifact(tmp_path, KEY, noticed.append)
    artifact.save("decode-1-greedy", saved(b"one"))
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    assert artifact.incompatibility() is None
    assert artifact.load("decode-1-greedy") is None
    assert len(noticed) == 1
    assert noticed[0].startswith(f"{manifest} is damaged")
    artifact.save("decode-2-greedy", saved(b"two"))
    assert artifact.load("decode-2-greedy") == saved(b"two")
    assert artifact.load("decode-1-greedy") is None, "its key is unknown"

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "a web app"}')
    assert "no manifest of an artifact" in str(Artifact(tmp_path / "other", KEY).incompatibility())


def test_a_damaged_bucket_is_reported(tmp_path: Path) -> None:
    noticed: list[str] = []
    artifact = Artifact(tmp_path, KEY, noticed.append)
    artifact.save("decode-1-greedy", saved(b"one"))
    (bucket,) = tmp_path.glob("*.bucket")
    bucket.write_bytes(bucket.read_bytes()[:-1])
    assert artifact.load("decode-1-greedy") is artifact.load("decode-2-greedy") is None
    assert noticed == [f"{bucket} is damaged: the bucket is compiled again"]


def test_loaded_libraries_are_saved_restored_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    library = here / "ab" / "cd.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"a library")
    monkeypatch.setattr(artifact_module, "_loaded_libraries", lambda: [library])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(here))
    artifact = Artifact(tmp_path / "artifact", KEY)
    artifact.save("decode-1-greedy", saved(b"one"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(there))
    assert artifact.load("decode-1-greedy") == saved(b"one")
    assert (there / "ab" / "cd.so").read_bytes() == b"a library"
    (saved_library,) = artifact.directory.rglob("*.so")
    whole = saved_library.read_bytes()
    saved_library.write_bytes(b"0" * 80)
    shutil.rmtree(there)
    noticed: list[str] = []
    artifact = Artifact(artifact.directory, KEY, noticed.append)
    for _ in range(2):
        artifact.load("decode-1-greedy")
    assert not list(there.rglob("*.so")), "a damaged library is left to the compiler"
    assert noticed == [f"{saved_library} is damaged: the library is compiled again"]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(here))  # where it has been made again
    artifact.repair()
    assert saved_library.read_bytes() == whole
