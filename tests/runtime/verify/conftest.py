"""Engines that several modules verify buckets of, compiled once."""

from collections.abc import Callable, Iterator

import pytest

from compiled_llm import CompiledLLM
from compiled_llm.runtime.buckets import Bucket
from tests.conftest import DEVICE
from tests.helpers.tiny_models import small_config, tiny_model
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as shrunk_model

ALL_SAMPLERS = {"decode": [4], "prefill": [48], "samplers": ["greedy", "random", "full", "scoring"]}
BUCKETS = [
    *(Bucket("prefill", 48, sampler) for sampler in ("greedy", "random", "full", "scoring")),
    *(Bucket("decode", 4, sampler) for sampler in ("greedy", "random", "full")),
]  # fmt: skip


@pytest.fixture(scope="package")
def llm() -> Iterator[CompiledLLM]:
    """An engine with windows, full attention and all samplers."""
    config = small_config(buckets=ALL_SAMPLERS, verify=True)
    with CompiledLLM(tiny_model("gemma2"), None, config, progress=False) as engine:
        yield engine


@pytest.fixture(scope="package")
def llm_with_states() -> Iterator[CompiledLLM]:
    """An engine whose model has recurrent states."""
    buckets = {"decode": [4], "prefill": [48], "samplers": ["full"]}
    model = shrunk_model(tiny_config("lfm2")).to(DEVICE)
    config = small_config(buckets=buckets, verify=True)
    with CompiledLLM(model, None, config, progress=False) as engine:
        yield engine


def launch_of(llm: CompiledLLM, bucket: Bucket) -> Callable[[], object]:
    """Return the compiled step of a bucket."""
    compiled = llm.model_runner.captured_buckets[bucket].compiled
    assert compiled is not None
    return compiled.launch
