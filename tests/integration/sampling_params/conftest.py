"""Engines that the tests of this directory share, eager and compiled."""

from collections.abc import Iterator
from typing import Any

import pytest

from compiled_llm import CompiledLLM
from tests.helpers.byte_model import TOKENIZER, VOCAB, Reference
from tests.helpers.tiny_models import small_config, tiny_model


@pytest.fixture(scope="package")
def reference() -> Reference:
    return Reference(tiny_model("llama", vocab_size=VOCAB))


@pytest.fixture(scope="package", params=["eager", "compiled"])
def llm(request: pytest.FixtureRequest) -> Iterator[CompiledLLM]:
    buckets = {"decode": [4], "prefill": [48], "samplers": ["full", "scoring"]}
    changes: dict[str, Any] = (
        {"compile": {"dispatch": "eager"}} if request.param == "eager" else {"buckets": buckets}
    )
    with CompiledLLM(
        tiny_model("llama", vocab_size=VOCAB), TOKENIZER, small_config(**changes), progress=False
    ) as engine:
        free = engine.engine.cache.num_free_blocks
        yield engine
        engine.engine.cache.check()
        assert engine.engine.cache.num_free_blocks == free
        if request.param == "compiled":
            assert not engine.report().fallbacks
