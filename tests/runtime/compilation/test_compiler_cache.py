"""The compiler's cache is private while an engine compiles; the user's own choice stays."""

import os
import threading
from pathlib import Path

import pytest
from torch._inductor import codecache
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from compiled_llm.runtime.compilation import compiler_cache
from compiled_llm.runtime.compilation.compiler_cache import private_compiler_cache

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the engine's cache directory, in a process without a choice of the user."""
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def test_it_is_used_while_an_engine_compiles(own: Path) -> None:
    headers = codecache._HEADER_DIR
    with private_compiler_cache():
        inside = Path(cache_dir())
        assert inside.is_relative_to(own / "inductor")
        assert inside.stat().st_mode & 0o777 == 0o700
        assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(inside)
        assert Path(codecache._HEADER_DIR).is_relative_to(inside)
    assert not any(name in os.environ for name in VARIABLES)
    assert headers == codecache._HEADER_DIR
    assert cache_dir() == default_cache_dir()


def test_inductors_default_is_replaced_and_restored(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor writes it to the environment when it first compiles."""
    chosen = {
        "TORCHINDUCTOR_CACHE_DIR": default_cache_dir(),
        "TRITON_CACHE_DIR": f"{default_cache_dir()}/triton/0",
    }
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    with private_compiler_cache():
        assert Path(cache_dir()).is_relative_to(own)
        assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(own)
    assert {name: os.environ[name] for name in VARIABLES} == chosen


def test_a_directory_that_the_user_chose_is_used(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    with private_compiler_cache():
        assert cache_dir() == str(tmp_path / "mine")
        assert "TRITON_CACHE_DIR" not in os.environ
    assert not own.exists()


def test_a_cache_that_others_may_write_is_not_used(own: Path) -> None:
    own.mkdir()
    own.chmod(0o777)
    with private_compiler_cache():
        inside = Path(cache_dir())
        assert not inside.is_relative_to(own)
        assert inside != Path(default_cache_dir())
        assert inside.stat().st_mode & 0o777 == 0o700
    with private_compiler_cache():
        assert Path(cache_dir()) == inside, "one directory per process"


def test_several_threads_may_use_it(own: Path) -> None:
    """It stays in use until the last thread leaves."""
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with private_compiler_cache():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with private_compiler_cache():
        thread.start()
        assert entered.wait(10)
    assert Path(cache_dir()).is_relative_to(own)
    leave.set()
    thread.join()
    assert not any(name in os.environ for name in VARIABLES)


def test_each_kind_of_processor_has_its_own(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of libraries depend on the compiler's flags, not on what `-march=native` is."""
    found = []
    for instructions in ("abc", "def"):
        monkeypatch.setattr(compiler_cache, "instruction_set", lambda name=instructions: name)
        compiler_cache._directory.cache_clear()
        with private_compiler_cache():
            found.append(Path(cache_dir()))
    compiler_cache._directory.cache_clear()
    assert found == [own / "inductor" / "abc", own / "inductor" / "def"]
