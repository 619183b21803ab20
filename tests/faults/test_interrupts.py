"""After an interrupt at any line of a call, outputs are right and all blocks are free."""

import random
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.config.schema import Config
from compiled_llm.engine.engine import Engine
from compiled_llm.engine.output_builder import RequestGroup
from compiled_llm.engine.request import Request
from compiled_llm.engine.run import run_to_completion
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from passes.attention_reach import FULL, AttentionReach
from tests.faults.injection import LineCounter
from tests.helpers.simulated import VOCAB_SIZE, SimulatedModelRunner
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

pytestmark = pytest.mark.gpu

NUM_PAGES = 24


def _simulated() -> Engine:
    """Return an engine of three rows with too few blocks, prefix caching and a window."""
    groups = [
        KVCacheGroup(reach=FULL, layers=(0,), num_pages=NUM_PAGES),
        KVCacheGroup(reach=AttentionReach.sliding(24), layers=(1,), num_pages=NUM_PAGES),
    ]
    limits = Limits(max_num_seqs=3, max_num_batched_tokens=32, max_model_len=160)
    model_runner = SimulatedModelRunner(
        groups, limits, block_size=16, prefill_sizes=[8, 32], apart=True, sharing=True
    )
    return Engine(model_runner, vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]


def _request_groups() -> list[RequestGroup]:
    """Return requests that share a prefix, with different sampling parameters."""
    beginning = [1 + number % 20 for number in range(40)]
    groups = []
    for number in range(6):
        params = SamplingParams(
            temperature=1.0 * (number % 2), seed=number, max_tokens=30, min_tokens=5 * (number % 3)
        )
        prompt = [*beginning[: 40 - 5 * (number % 2)], 1 + number]
        stops = frozenset({3}) if number % 3 else frozenset()
        groups.append(
            RequestGroup(
                prompt=None,
                requests=[
                    Request(
                        prompt_token_ids=prompt,
                        sampling_params=params,
                        seed=number,
                        max_tokens=30,
                        stop_token_ids=stops,
                    )
                ],
            )
        )
    return groups


def _tokens(engine: Engine) -> list[tuple[list[int], str | None]]:
    groups = _request_groups()
    for _ in run_to_completion(engine, groups):
        pass
    return [(group.requests[0].token_ids, group.requests[0].finish_reason) for group in groups]


def _places(total: int, count: int, seed: int) -> Iterator[int]:
    """Return some of the lines, spread over all of them."""
    rng = random.Random(seed)
    return (min(total - 1, int((number + rng.random()) * total / count)) for number in range(count))


def _check_idle(engine: Engine, free: list[int]) -> None:
    engine.cache.check()
    assert engine.cache.num_free_blocks == free
    assert not engine.has_work


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_the_simulated_engine(error: type[BaseException]) -> None:
    """Interrupt six requests on three rows at about 400 lines, in all modules of the engine."""
    engine = _simulated()
    free = engine.cache.num_free_blocks
    with LineCounter(None) as lines:
        want = _tokens(engine)
    assert lines.count > 2000
    places = set()
    for at in _places(lines.count, 400, seed=0):
        with LineCounter(at, error) as lines:
            try:
                _tokens(engine)
            except error:
                places.add(lines.where)
        assert _tokens(engine) == want, lines.where
        _check_idle(engine, free)
    assert len(places) > 100, "the interrupts met few lines"
    assert engine.broken is None


@pytest.mark.parametrize("config", [small_config(compile={"dispatch": "eager"})], ids=["eager"])
def test_generate_on_a_model(config: Config) -> None:
    _check_model(config, 60)


def test_generate_on_compiled_steps() -> None:
    config = small_config(buckets={"decode": [], "prefill": [48], "samplers": ["greedy"]})
    _check_model(config, 60)


def _check_model(config: Config, count: int) -> None:
    model = tiny_model("llama")
    reference = Reference(model)
    prompts = [prompt_of(17 + 7 * number, number) for number in range(6)]
    want = [reference(prompt, 12) for prompt in prompts]
    with CompiledLLM(model, None, config, progress=False) as llm:
        free = llm.engine.cache.num_free_blocks
        with LineCounter(None) as lines:
            assert greedy(llm, prompts, 12) == want
        for at in _places(lines.count, count, seed=1):
            _interrupt(lambda: greedy(llm, prompts, 12), at)
            assert greedy(llm, prompts, 12) == want
            _check_idle(llm.engine, free)
        assert llm.report().scheduling.recoveries > count // 3


def _interrupt(call: Callable[[], object], at: int) -> None:
    with LineCounter(at), suppress(KeyboardInterrupt):
        call()
