"""A compiled engine and its reference, which the tests of this directory share."""

from collections.abc import Iterator

import pytest

from compiled_llm import CompiledLLM
from tests.helpers.tiny_models import (
    Reference,
    small_config,
    tiny_model,
)


@pytest.fixture(scope="package")
def reference() -> Reference:
    return Reference(tiny_model("llama"))


@pytest.fixture(scope="package")
def llm() -> Iterator[CompiledLLM]:
    config = small_config(
        buckets={"decode": [4], "prefill": [48], "samplers": ["greedy", "random"]}
    )
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as engine:
        yield engine
