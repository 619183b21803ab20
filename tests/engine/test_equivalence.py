"""Requests that arrive, leave, share and are preempted generate what each generates alone."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from compiled_llm import CompiledLLM
from compiled_llm.engine.request import Request
from tests.helpers.arrivals import Case, random_cases, rearranged, run_alone, run_together
from tests.helpers.tiny_models import Reference, small_config, tiny_model

pytestmark = pytest.mark.gpu

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 640}
A_SEQUENCE_AND_A_BIT = (
    44 * 16 * 2 * 2 * 2 * 16 * 4
)  # pages, tokens, layers, keys and values, heads, dim, bytes


@pytest.fixture(scope="module")
def llm() -> Iterator[CompiledLLM]:
    config = small_config(
        limits=LIMITS,
        cache={"memory": A_SEQUENCE_AND_A_BIT},
        buckets={"decode": [8], "prefill": [64], "samplers": ["greedy", "full"]},
    )
    with CompiledLLM(
        tiny_model("llama", max_position_embeddings=1024), None, config, progress=False
    ) as engine:
        yield engine


def _check(case: Case, expected: Request, request: Request) -> None:
    if request.finish_reason == "abort":
        assert case.abort_after is not None
        assert request.token_ids == expected.token_ids[: len(request.token_ids)]
        return
    assert (request.token_ids, request.finish_reason) == (
        expected.token_ids,
        expected.finish_reason,
    )
    for got, wanted in zip(request.logprobs or [], expected.logprobs or [], strict=True):
        assert {token: entry.rank for token, entry in got.items()} == {
            token: entry.rank for token, entry in wanted.items()
        }
        assert [e.logprob for e in got.values()] == pytest.approx(
            [e.logprob for e in wanted.values()], abs=1e-4
        )


def test_tokens_do_not_depend_on_what_else_runs(llm: CompiledLLM) -> None:
    cases = random_cases(200, longest=600, max_tokens=80)
    alone = [run_alone(llm, case) for case in cases]
    reference = Reference(tiny_model("llama", max_position_embeddings=1024))
    plain = [
        n
        for n, case in enumerate(cases)
        if case.params.sampler == "greedy" and case.params.ignore_eos
    ]
    assert len(plain) > 20
    for number in plain[:20]:
        assert alone[number].token_ids == reference(cases[number].prompt, alone[number].max_tokens)

    free, stats = llm.engine.cache.num_free_blocks, llm.report().scheduling
    for arranged in (cases, rearranged(cases, 1)):
        llm.reset_prefix_cache()
        before = replace(stats)
        together = run_together(llm, arranged)
        for case, expected, request in zip(arranged, alone, together, strict=True):
            _check(case, expected, request)
        assert llm.engine.cache.num_free_blocks == free
        assert stats.preemptions >= before.preemptions + 5
        assert stats.cached_tokens > before.cached_tokens + 500
    assert not llm.report().fallbacks


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_windows_let_go_of_pages_and_nothing_else_changes(family: str) -> None:
    """Run hybrid and all-window models in caches too small for all rows, eagerly."""
    model = tiny_model(family, max_position_embeddings=1024)
    config = small_config(limits=LIMITS, compile={"dispatch": "eager"}, cache={"memory": "2MiB"})
    cases = random_cases(40, longest=300, max_tokens=24, seed=1)
    with CompiledLLM(model, None, config, progress=False) as llm:
        free = llm.engine.cache.num_free_blocks
        alone = [run_alone(llm, case) for case in cases]
        together = run_together(llm, cases)
        assert llm.engine.cache.num_free_blocks == free
    for expected, request in zip(alone, together, strict=True):
        if request.finish_reason != "abort":
            assert request.token_ids == expected.token_ids


def test_a_window_of_pages_serves_sequences_of_any_length() -> None:
    """In a model whose layers all slide, a cache smaller than one sequence suffices."""
    model = tiny_model("phi3", max_position_embeddings=1024)
    config = small_config(
        limits={"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 640},
        compile={"dispatch": "eager"},
    )
    with CompiledLLM(model, None, config, progress=False) as llm:
        (pages,) = llm.engine.cache.num_free_blocks
        assert pages < 2 * 640 // 16 // 4
        (case,) = random_cases(
            1,
            longest=600,
            max_tokens=30,
            seed=3,
            samplings=[{"temperature": 0, "max_tokens": 30, "ignore_eos": True}],
        )
        case = replace(case, prompt=(case.prompt * 600)[:600])
        assert run_alone(llm, case).token_ids == Reference(model)(case.prompt, 30)


def test_ten_thousand_tiny_requests_leave_nothing_behind() -> None:
    import psutil

    model = tiny_model("llama", num_hidden_layers=1)
    config = small_config(
        limits={"max_num_seqs": 64, "max_num_batched_tokens": 128, "max_model_len": 64},
        compile={"dispatch": "eager"},
    )
    with CompiledLLM(model, None, config, progress=False) as llm:
        free, process = llm.engine.cache.num_free_blocks, psutil.Process()

        def run(count: int, seed: int) -> int:
            cases = random_cases(
                count,
                longest=3,
                max_tokens=2,
                seed=seed,
                samplings=[{"temperature": 0}, {"temperature": 1.0}],
            )
            outputs = llm.generate([case.prompt for case in cases], [case.params for case in cases])
            assert all(1 <= len(output.outputs[0].token_ids) <= 2 for output in outputs)
            assert llm.engine.cache.num_free_blocks == free
            return int(process.memory_info().rss)

        run(1000, 0)
        before = run(1000, 1)
        for part in range(10):
            after = run(1000, 2 + part)
        assert after - before < 20 * 2**20
        assert not llm.engine.has_work
        llm.engine.cache.check()
