"""The cache directory follows the environment."""

from pathlib import Path

import pytest

from compiled_llm.system.paths import cache_dir


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"COMPILED_LLM_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/compiled_llm")),
        ({"COMPILED_LLM_CACHE": "", "HOME": "/c"}, Path("/c/.cache/compiled_llm")),
    ],
)
def test_the_cache_directory(
    environment: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COMPILED_LLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == expected
