"""Files that other users own or may write to are detected, at any level of the path."""

import os
from pathlib import Path

import pytest

from compiled_llm.errors import UntrustedFileError
from compiled_llm.system import file_trust
from compiled_llm.system.file_trust import make_private_directory, read_trusted, untrusted_reason


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a private file in two private directories."""
    found = tmp_path / "a" / "b" / "code.so"
    make_private_directory(found.parent)
    found.write_bytes(b"code")
    found.chmod(0o600)
    return found


def test_a_private_file_is_read(path: Path) -> None:
    assert untrusted_reason(path) is None
    assert read_trusted(path) == b"code"
    path.chmod(0o644)
    path.parent.chmod(0o755)
    assert untrusted_reason(path) is None, "others may read it"


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_path_that_others_may_write_is_refused(path: Path, levels: int, mode: int) -> None:
    place = [path, *path.parents][levels]
    place.chmod(0o700 | mode)
    reason = untrusted_reason(path)
    assert reason is not None
    assert "\n" not in reason
    assert (
        reason == f"others may write to {place} (mode {0o700 | mode:o}): run `chmod go-w {place}`"
    )
    with pytest.raises(UntrustedFileError, match="others may write"):
        read_trusted(path)


def test_a_parent_may_be_writable_with_the_sticky_bit(path: Path) -> None:
    path.parents[1].chmod(0o1777)
    assert untrusted_reason(path) is None
    assert untrusted_reason(path.parents[1]) is not None, "others may add files to it"


def test_a_path_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(path.parent, 12345, -1)
        assert (
            untrusted_reason(path)
            == f"{path.parent} belongs to another user (uid 12345): expected this user or root"
        )
    else:
        monkeypatch.setattr(file_trust.os, "geteuid", lambda: os.getuid() + 1)
        assert f"belongs to another user (uid {os.getuid()})" in str(untrusted_reason(path))


def test_the_target_of_a_link_is_checked(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path.parent)
    assert untrusted_reason(link / path.name) is None
    path.parents[1].chmod(0o770)
    assert str(path.parents[1]) in str(untrusted_reason(link / path.name))


def test_the_parents_of_a_missing_path_are_checked(tmp_path: Path) -> None:
    assert untrusted_reason(tmp_path / "new" / "artifact") is None
    tmp_path.chmod(0o777)
    assert untrusted_reason(tmp_path / "new" / "artifact") is not None
