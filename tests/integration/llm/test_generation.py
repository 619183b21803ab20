"""Generation through the Python API: stop conditions, seeds, joining, preemption, priorities."""

from typing import Any

import pytest
import torch

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.engine.run import run_to_completion
from tests.helpers.eager_engine import eager_llm
from tests.helpers.tiny_models import (
    Reference,
    greedy,
    prompt_of,
    small_config,
    tiny_model,
)


def test_one_prompt_or_many_with_one_or_many_params(llm: CompiledLLM, reference: Reference) -> None:
    (single,) = llm.generate(
        prompt_of(9), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    )
    assert single.prompt is None
    assert single.prompt_token_ids == prompt_of(9)
    assert single.outputs[0].token_ids == reference(prompt_of(9), 5)
    assert (single.outputs[0].finish_reason, single.text) == ("length", "")
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 7)]
    first, second = llm.generate([prompt_of(9), prompt_of(20)], params)
    assert first.outputs[0].token_ids == reference(prompt_of(9), 3)
    assert second.outputs[0].token_ids == reference(prompt_of(20), 7)
    assert llm.generate([]) == []


def test_requests_stop_at_stop_tokens_and_at_the_length_limit(
    llm: CompiledLLM, reference: Reference
) -> None:
    expected = reference(prompt_of(9), 12)
    stop = expected[4]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    output = llm.generate(prompt_of(9), params)[0].outputs[0]
    assert output.token_ids == expected[: expected.index(stop) + 1]
    assert output.finish_reason == "stop"
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    output = llm.generate(prompt_of(100), params)[0].outputs[0]
    assert output.token_ids == reference(prompt_of(100), 28)
    assert output.finish_reason == "length"


def test_seeded_sampling_does_not_depend_on_the_batch(llm: CompiledLLM) -> None:
    params = [
        SamplingParams(temperature=1.5, max_tokens=10, seed=seed, ignore_eos=True)
        for seed in range(7)
    ]
    prompts = [prompt_of(5 + 9 * seed, seed) for seed in range(7)]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    alone = [
        llm.generate(prompt, wanted)[0].outputs[0].token_ids
        for prompt, wanted in zip(prompts, params, strict=True)
    ]
    backwards = [
        output.outputs[0].token_ids for output in llm.generate(prompts[::-1], params[::-1])
    ]
    assert together == alone == backwards[::-1]
    other = llm.generate(
        prompts[0], SamplingParams(temperature=1.5, max_tokens=10, seed=99, ignore_eos=True)
    )
    assert other[0].outputs[0].token_ids != alone[0]
    unseeded = SamplingParams(temperature=1.5, max_tokens=10, ignore_eos=True)
    assert (
        len({tuple(llm.generate(prompts[0], unseeded)[0].outputs[0].token_ids) for _ in range(4)})
        > 1
    )


def _to_nan(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


def _ban_all(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.full_like(logits, float("-inf"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("processor", [_to_nan, _ban_all])
def test_scores_that_are_not_finite_end_their_request_alone(
    llm: CompiledLLM, reference: Reference, processor: Any, temperature: float
) -> None:
    plain = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    bad = SamplingParams(temperature=temperature, max_tokens=6, logits_processors=[processor])
    good, failed = (
        output.outputs[0] for output in llm.generate([prompt_of(9), prompt_of(20)], [plain, bad])
    )
    assert good.token_ids == reference(prompt_of(9), 6)
    assert (failed.token_ids, failed.finish_reason) == ([], "error")
    assert "its next token are not finite" in str(failed.error)


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"logprobs": 1}],
)
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_logits_that_are_not_finite_end_their_request_alone(
    reference: Reference, params: dict[str, Any], bad: str
) -> None:
    """A broken row of the output head ends the requests whose prompts are computed after it."""
    model = tiny_model("llama")
    with CompiledLLM(
        model, None, small_config(compile={"dispatch": "eager"}), progress=False
    ) as llm:
        right = model.lm_head.weight[5].clone()
        with torch.no_grad():
            model.lm_head.weight[5] = float(bad)
        output = llm.generate(
            [prompt_of(20)], SamplingParams(**{"max_tokens": 6, "seed": 1, **params})
        )[0].outputs[0]
        assert (output.token_ids, output.finish_reason) == ([], "error")
        with torch.no_grad():
            model.lm_head.weight[5] = right
        assert greedy(llm, [prompt_of(20)], 6) == [reference(prompt_of(20), 6)]
        (again,) = llm.generate([prompt_of(20)], SamplingParams(temperature=0, max_tokens=1))
        assert again.num_cached_tokens == 16, (
            "what the request that succeeded has computed is shared"
        )


def test_requests_join_and_leave_at_any_step(llm: CompiledLLM, reference: Reference) -> None:
    free = llm.engine.cache.num_free_blocks
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    abandoned = run_to_completion(
        llm.engine, llm._runner.make_groups([prompt_of(9)], params, None, streaming=True)
    )
    slow = llm._runner.make_groups([prompt_of(30)], params, None, streaming=True)
    running = run_to_completion(llm.engine, slow)
    next(abandoned), next(running)
    assert greedy(llm, [prompt_of(20)], 5) == [reference(prompt_of(20), 5)]
    abandoned.close()
    for _ in running:
        pass
    assert slow[0].requests[0].token_ids == reference(prompt_of(30), 50)
    assert llm.engine.cache.num_free_blocks == free
    llm.engine.cache.check()


def test_a_small_cache_makes_requests_wait_their_turn(reference: Reference) -> None:
    """With blocks for one and a half sequences, requests are preempted, and outputs are right."""
    config = small_config(
        compile={"dispatch": "eager"}, cache={"memory": 13 * 16 * 2 * 2 * 2 * 16 * 4}
    )
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as engine:
        assert engine.engine.cache.num_free_blocks == [12]
        prompts = [prompt_of(length) for length in (60, 45, 10, 50, 100, 30, 14)]
        assert greedy(engine, prompts, 25) == [reference(prompt, 25) for prompt in prompts]
        assert engine.report().scheduling.preemptions
        assert engine.engine.cache.num_free_blocks == [12]
    with pytest.raises(
        ValueError,
        match=r"one sequence of 128 tokens needs .* "
        "lower limits.max_model_len or raise cache.memory",
    ):
        CompiledLLM(tiny_model("llama"), None, small_config(cache={"memory": 1000}), progress=False)


def test_a_failing_detokenizer_ends_its_request_alone(
    llm: CompiledLLM, reference: Reference
) -> None:
    class Failing:
        text = ""

        def push(self, token_ids: list[int]) -> bool:
            raise KeyError("no such token")

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    bad, good = llm._runner.make_groups(
        [prompt_of(9), prompt_of(20)], params, None, streaming=False
    )
    bad.requests[0].detokenizer = Failing()  # type: ignore[assignment]
    for _ in run_to_completion(llm.engine, [bad, good]):
        pass
    assert (bad.requests[0].finish_reason, bad.requests[0].error) == (
        "error",
        "KeyError: 'no such token'",
    )
    assert good.requests[0].token_ids == reference(prompt_of(20), 8)
    llm.engine.cache.check()


def test_higher_priorities_go_first() -> None:
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 48, "max_model_len": 128}
    with eager_llm(limits) as engine:
        outputs = engine.generate(
            [prompt_of(9)] * 4, SamplingParams(temperature=0, max_tokens=3), priority=[2, 1, 0, 1]
        )
        began = [
            output.outputs[0].metrics.queue
            for output in outputs
            if output.outputs[0].metrics is not None
        ]
        assert sorted(range(4), key=lambda number: began[number] or 0.0) == [2, 1, 3, 0]
