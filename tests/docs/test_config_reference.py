"""Tests that the configuration page lists every key of the schema with its meaning."""

from typing import Any

import pytest

from compiled_llm import Config
from tests.helpers.docs_hooks import load_hook


@pytest.fixture(scope="module")
def hook() -> Any:
    return load_hook("config_reference")


def test_every_key_has_a_row(hook: Any) -> None:
    page = hook.on_page_markdown("# Keys\n\n<!-- config reference -->\n")
    for name, field in Config.model_fields.items():
        keys = getattr(field.annotation, "model_fields", {name: field})
        for key in keys:
            assert f"\n| `{key}` | " in page
        assert (f"### `{name}`" in page) == (keys != {name: field})


def test_every_key_has_a_meaning(hook: Any) -> None:
    page = hook.on_page_markdown("<!-- config reference -->")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.endswith("|  |")] == []


def test_a_row_gives_values_default_and_bounds(hook: Any) -> None:
    page = hook.on_page_markdown("<!-- config reference -->")
    assert "| `max_num_seqs` | `auto`, or integer from 1 to 65,536 | `auto` |" in page
    assert "| `growth` | number from 1.05 | `4.0` |" in page
    assert "| `cache_limit` | a size such as `2GiB`, or bytes | `10GiB` |" in page
    assert "| `strict` | `true`, `false` | `false` |" in page


def test_keys_are_separated_from_prose(hook: Any) -> None:
    docstring = "A section.\n\nAttributes:\n    first: one thing,\n        on two lines.\n\nMore."
    prose, meanings = hook.split_docstring(docstring, {"first", "second"})
    assert [line for line in prose if line] == ["A section.", "More."]
    assert meanings == {"first": "One thing, on two lines."}


def test_other_pages_are_unchanged(hook: Any) -> None:
    assert hook.on_page_markdown("# Page") == "# Page"
