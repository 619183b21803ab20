"""Tests that the API pages list every public name once."""

from typing import Any

import pytest

import compiled_llm
from tests.helpers.docs_hooks import load_hook


@pytest.fixture(scope="module")
def hook() -> Any:
    return load_hook("public_names")


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
