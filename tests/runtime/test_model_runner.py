"""A model runner without compilation: batches in, tokens and logprobs out."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compiled_llm import CompiledLLM
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.model_runner import ModelRunner
from compiled_llm.runtime.step.batch_inputs import DecodeBatch, PrefillBatch
from compiled_llm.runtime.step.buffers import RING_SIZE
from compiled_llm.runtime.step.sampler import SamplingTensors
from compiled_llm.runtime.step.sampler_state import SamplerState
from tests.helpers.tiny_models import Reference, prompt_of, small_config, tiny_model


@pytest.fixture(scope="module")
def llm() -> Iterator[CompiledLLM]:
    config = small_config(compile={"dispatch": "eager"})
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as engine:
        yield engine


@pytest.fixture
def runner(llm: CompiledLLM) -> ModelRunner:
    return llm.model_runner


def _prompt(runner: ModelRunner, prompt: list[int], row: int, **params: float) -> PrefillBatch:
    """The first step of a prompt in this row, on pages from 1 on."""
    state, length = runner.memory.state, len(prompt)
    tables = np.zeros((state.num_groups, 1, state.max_blocks), np.int32)
    blocks = -(-(length + 16) // runner.memory.block_size)
    tables[:, 0, :blocks] = np.arange(1, blocks + 1)
    return PrefillBatch(
        ids=np.array(prompt),
        logprob_targets=np.full(length, -1),
        num_logprobs=np.full(length, -1),
        seq_rows=np.array([row]),
        starts=np.array([0]),
        lengths=np.array([length]),
        block_tables=tables,
        params=SamplingTensors.pack(**params)[None],  # type: ignore[arg-type]
        recent=np.full((1, state.recent.shape[1]), -1),
        is_prompt=np.array([1]),
        sample_mask=np.array([1]),
        sampler="full",
    )


def test_prefill_and_decode_give_the_models_tokens(llm: CompiledLLM, runner: ModelRunner) -> None:
    prompt, row = prompt_of(20), 2
    expected = Reference(llm.model)(prompt, 5)
    tokens = [int(runner.tokens(runner.prefill(_prompt(runner, prompt, row)))[row])]
    decode = DecodeBatch(rows=np.array([row]), sampler="full")
    for _ in range(4):
        tokens.append(int(runner.tokens(runner.decode(decode))[row]))
        decode = DecodeBatch(rows=np.array([row]), sampler="full", unchanged=True)
    assert tokens == expected
    assert set(runner.report.fallbacks) == {"compile.dispatch is eager"}


def test_logprobs_of_a_step(runner: ModelRunner) -> None:
    row = 1
    handle = runner.prefill(_prompt(runner, prompt_of(9), row, logprobs=3))
    logprobs, token = runner.logprobs(handle), int(runner.tokens(handle)[row])
    expected = runner.logits(row)[0].log_softmax(-1)
    assert logprobs.ids[row, 1] == token
    assert logprobs.values[row, 0] == pytest.approx(float(expected[token]), abs=1e-4)
    top = expected.topk(3).values.cpu().numpy()
    np.testing.assert_allclose(logprobs.values[row, 1:4], top, atol=1e-4)


def test_the_host_samples_from_other_logits(runner: ModelRunner) -> None:
    row = 0
    runner.prefill(_prompt(runner, prompt_of(9), row, logprobs=1))
    logits = torch.full_like(runner.logits(row), -5.0)
    logits[0, 7] = 1.0
    token, logprobs = runner.sample_from_logits(row, logits)
    assert token == int(runner.memory.state.tokens[row]) == 7
    own = runner.logits(row)[0].log_softmax(-1)
    assert logprobs.values[0] == pytest.approx(float(own[7]), abs=1e-4)
    token, _ = runner.sample_from_logits(row, torch.full_like(logits, float("nan")))
    assert token == -1


def test_the_state_of_a_row_changes_what_is_sampled(runner: ModelRunner) -> None:
    row, vocab_size = 3, runner.memory.state.logits.shape[1]
    bias = np.full(vocab_size, -np.inf, np.float32)
    bias[11] = 0
    runner.write_sampler_state(row, SamplerState(bias=bias))
    handle = runner.prefill(_prompt(runner, prompt_of(5), row, biased=True))
    assert runner.tokens(handle)[row] == 11


def test_outputs_are_readable_for_a_few_steps(runner: ModelRunner) -> None:
    first = runner.prefill(_prompt(runner, prompt_of(5), 0))
    decode = DecodeBatch(rows=np.array([0]), sampler="full")
    for _ in range(RING_SIZE - 1):
        runner.decode(decode)
    runner.tokens(first)
    runner.decode(decode)
    with pytest.raises(AssertionError, match="were overwritten"):
        runner.tokens(first)


def test_steps_go_on_after_recovery(runner: ModelRunner) -> None:
    runner.prefill(_prompt(runner, prompt_of(5), 0))
    runner.memory.state.split_counters.fill_(3)
    runner.recover()
    assert not runner.memory.state.split_counters.any()
    handle = runner.prefill(_prompt(runner, prompt_of(6), 0))
    assert handle.step == int(runner.memory.state.step) - 1
    assert runner.tokens(handle)[0] >= 0


def test_decode_is_separate_without_prefill_buckets_alone(runner: ModelRunner) -> None:
    assert runner.separate_decode
    assert runner.prefill_sizes == [16, 48]
    assert runner.captured_buckets == {}
    assert not runner.capture_pending


@pytest.mark.parametrize(
    ("due", "overdue", "prompts", "outputs", "result", "captures"),
    [
        (False, False, False, False, False, False),
        (True, False, False, False, False, True),
        (True, False, False, True, True, False),
        (True, False, True, False, False, False),
        (True, False, True, True, False, False),
        (True, True, True, False, False, True),
        (True, True, True, True, True, False),
    ],
)
def test_when_a_bucket_is_captured(
    due: bool, overdue: bool, prompts: bool, outputs: bool, result: bool, captures: bool
) -> None:
    runner, captured = ModelRunner.__new__(ModelRunner), list[bool]()
    runner._lazy = SimpleNamespace(is_due=due, is_overdue=overdue)  # type: ignore[assignment]
    runner.capture_next = lambda: captured.append(True)  # type: ignore[method-assign]
    assert runner.maybe_capture(prompts_pending=prompts, steps_in_flight=outputs) == result
    assert bool(captured) == captures


def test_traffic_counts_the_sizes_of_steps(runner: ModelRunner) -> None:
    before = runner._traffic["prefill"].seen[13]
    runner.prefill(_prompt(runner, prompt_of(13), 0))
    assert runner._traffic["prefill"].seen[13] == before + 1
    assert runner._traffic["prefill"].limit == runner.limits.max_num_batched_tokens
    assert Bucket("decode", runner.limits.max_num_seqs).size == runner._traffic["decode"].limit
