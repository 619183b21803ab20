"""Engines that the tests of a module share."""

import asyncio
from collections.abc import Iterator

import pytest

from compiled_llm import AsyncCompiledLLM, CompiledLLM
from tests.helpers.async_engine import (
    free_blocks,
    make_llm,
)
from tests.helpers.tiny_models import Reference, tiny_model


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(tiny_model("llama"))


@pytest.fixture(scope="module")
def synchronous() -> Iterator[CompiledLLM]:
    with make_llm() as engine:
        yield engine


@pytest.fixture(scope="module")
def shared() -> Iterator[AsyncCompiledLLM]:
    engine = AsyncCompiledLLM(make_llm)
    yield engine
    engine.close()


@pytest.fixture
def llm(shared: AsyncCompiledLLM) -> Iterator[AsyncCompiledLLM]:
    """Return the shared engine, and check afterwards that all blocks are free and it is idle."""
    before = asyncio.run(free_blocks(shared))
    yield shared
    assert asyncio.run(free_blocks(shared)) == before
    assert not asyncio.run(shared.call(lambda llm: llm.engine.num_waiting))
