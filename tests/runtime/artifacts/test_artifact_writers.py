"""Artifacts with several writers: locks, killed processes and unfinished files."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compiled_llm.runtime.artifacts.artifact import Artifact
from compiled_llm.system import atomic_file
from tests.helpers.artifacts import KEY, saved


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "libraries" / "ab").mkdir(parents=True)
    left = [tmp_path / ".unfinished-abc", tmp_path / "libraries" / "ab" / ".unfinished-def"]
    (tmp_path / "src").mkdir()
    others = [tmp_path / "src" / ".unfinished-poem", tmp_path / ".gitignore"]
    for path in [*left, *others]:
        path.write_bytes(b"")
    Artifact(tmp_path, KEY).save("decode-1-greedy", saved(b"one"))
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_a_lock_held_by_another_process_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_file, "_TIMEOUT", 0.1)
    artifact = Artifact(tmp_path, KEY)
    with (
        atomic_file.locked(tmp_path),
        pytest.raises(TimeoutError, match="another process has held the lock"),
    ):
        artifact.save("decode-1-greedy", saved(b"one"))
    artifact.save("decode-1-greedy", saved(b"two"))
    assert artifact.load("decode-1-greedy") == saved(b"two")


_WRITER = """
import sys, time
from pathlib import Path
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint
from compiled_llm.runtime.artifacts.artifact import Artifact, SavedBucket
artifact = Artifact(Path(sys.argv[1]), Fingerprint({"torch": "2.11.0", "model": "a"}))
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    time.sleep(0.002)
    artifact.save("decode-1-greedy", SavedBucket(step=sys.argv[2].encode() * 1_000_000, passes=[]))
"""


def _writer(directory: Path, letter: str, times: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(directory), letter, str(times)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_two_writers_and_a_killed_one_leave_a_complete_file(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, KEY)
    one, other = _writer(tmp_path, "x", 100_000), _writer(tmp_path, "y", 3)
    assert other.wait(120) == 0, "the lock was not released"
    for _ in range(3):
        found = artifact.load("decode-1-greedy")
        assert found is not None
        assert found.step in (b"x" * 1_000_000, b"y" * 1_000_000)
        time.sleep(0.05)
    one.send_signal(signal.SIGKILL)
    one.wait(60)
    assert artifact.load("decode-1-greedy") is not None
    (tmp_path / ".unfinished-killed").write_bytes(b"x")
    last = _writer(tmp_path, "z", 1)
    assert last.wait(60) == 0
    assert artifact.load("decode-1-greedy") == saved(b"z" * 1_000_000)
    assert not list(tmp_path.glob(".unfinished-*"))
