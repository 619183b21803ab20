"""An engine may be used in the thread and process that created it."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from compiled_llm.runtime.thread_owner import ThreadOwner


def test_the_creating_thread_is_the_owner() -> None:
    owner = ThreadOwner()
    owner.check()
    assert owner.is_current
    assert owner.thread == threading.get_ident()


def test_another_thread_is_refused() -> None:
    owner = ThreadOwner()
    with ThreadPoolExecutor(1) as executor:
        assert not executor.submit(lambda: owner.is_current).result()
        with pytest.raises(RuntimeError, match="belongs to the thread that made it"):
            executor.submit(owner.check).result()


def test_a_forked_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, process = ThreadOwner(), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    assert not owner.is_current
    with pytest.raises(RuntimeError, match=f"belongs to process {process}, and this is a fork"):
        owner.check()
