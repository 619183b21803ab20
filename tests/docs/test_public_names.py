"""Tests that the API pages list every public name once."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import compiled_llm

_HOOK = Path(__file__).parents[2] / "docs" / "_hooks" / "public_names.py"


@pytest.fixture(scope="module")
def hook() -> Any:
    spec = importlib.util.spec_from_file_location("public_names", _HOOK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_names_are_those_of_the_package(hook: Any) -> None:
    assert hook.public_names("compiled_llm") == compiled_llm.__all__


def test_each_name_gets_one_block(hook: Any) -> None:
    markers = "<!-- public names of passes: *Error -->\n\n<!-- public names of passes: * -->\n"
    page = hook.on_page_markdown(f"::: passes.Pipeline\n\n{markers}")
    blocks = [line for line in page.splitlines() if line]
    names = hook.public_names("passes")
    assert sorted(blocks) == sorted(f"::: passes.{name}" for name in names)
    assert blocks[:2] == ["::: passes.Pipeline", "::: passes.PassError"]


def test_a_package_without_public_names_is_refused(hook: Any) -> None:
    with pytest.raises(ValueError, match="has no __all__"):
        hook.public_names("tests")
