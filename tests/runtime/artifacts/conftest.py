"""Fixtures of a tiny checkpoint and its reference tokens."""

from pathlib import Path

import pytest

from tests.helpers.tiny_models import Reference, tiny_model
from tests.runtime.artifacts.engines import PROMPTS


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    reference = Reference(tiny_model("llama"))
    return [reference(prompt, 10) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save tiny llama: `from_pretrained` identifies it by its source, without tracing."""
    tiny_model("llama").save_pretrained(directory := tmp_path_factory.mktemp("checkpoint"))
    return directory
