"""Atomic writes, and locks of directories."""

import os
import threading
from pathlib import Path

import pytest

from compiled_llm.system import atomic_file
from compiled_llm.system.atomic_file import locked, remove_unfinished, write_atomic


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_files_and_directories_are_private(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        write_atomic(tmp_path / "new" / "file", b"")
    finally:
        os.umask(umask)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert (tmp_path / "new" / "file").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(
    error: BaseException, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(atomic_file.os, call, fail)
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_readers_see_a_complete_file(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", {bytes([n]) * 100_000 for n in range(2)}
    write_atomic(path, min(contents))
    done = threading.Event()

    def write() -> None:
        for _ in range(30):
            for content in contents:
                write_atomic(path, content)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert path.read_bytes() in contents
    writer.join()


def test_a_lock_is_exclusive_and_released(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    with locked(directory), pytest.raises(TimeoutError, match="has held the lock"):  # noqa: SIM117
        with locked(directory, timeout=0):
            pytest.fail("two hold the lock")
    with locked(directory, timeout=0):
        pass
    with pytest.raises(KeyError), locked(directory):
        raise KeyError
    with locked(directory, timeout=0):
        pass


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    held, order = threading.Event(), list[str]()

    def hold() -> None:
        with locked(tmp_path):
            held.set()
            threading.Event().wait(0.1)
            order.append("first")

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    with locked(tmp_path):
        order.append("second")
    holder.join()
    assert order == ["first", "second"]


def test_only_unfinished_files_are_removed(tmp_path: Path) -> None:
    unfinished, other = tmp_path / ".unfinished-abc", tmp_path / ".hidden"
    for path in (unfinished, other):
        path.write_bytes(b"")
    remove_unfinished([unfinished, other, tmp_path / ".unfinished-gone"])
    assert not unfinished.exists()
    assert other.exists()
