"""Batches in the step's buffers: laid out and padded as the steps read them."""

import numpy as np
import pytest
import torch

from compiled_llm.runtime.step.batch_inputs import (
    RECENT,
    TRASH_PAGE,
    DecodeBatch,
    DecodeInputs,
    PrefillBatch,
    PrefillInputs,
)
from compiled_llm.runtime.step.buffers import StepBuffers
from compiled_llm.runtime.step.sampler import SamplingTensors
from compiled_llm.runtime.step.sampler_state import SamplerState
from tests.conftest import DEVICE

MAX_SEQS = 4
MAX_BLOCKS = 3
NUM_GROUPS = 2
VOCAB_SIZE = 40


@pytest.fixture
def buffers() -> StepBuffers:
    return StepBuffers(
        max_num_seqs=MAX_SEQS,
        max_blocks=MAX_BLOCKS,
        max_tokens=16,
        num_groups=NUM_GROUPS,
        num_kv_heads=1,
        vocab_size=VOCAB_SIZE,
        dtype=torch.float32,
        device=DEVICE,
    )


def _prefill_batch() -> PrefillBatch:
    """Row 2 decodes at position 7; row 0 brings three tokens of its prompt from position 4 on."""
    return PrefillBatch(
        ids=np.array([-1, 11, 12, 13]),
        logprob_targets=np.array([-1, 12, 13, VOCAB_SIZE + 5]),
        num_logprobs=np.array([-1, 0, 2, 2]),
        seq_rows=np.array([2, 0]),
        starts=np.array([7, 4]),
        lengths=np.array([1, 3]),
        block_tables=np.arange(NUM_GROUPS * 2 * MAX_BLOCKS, dtype=np.int32).reshape(
            NUM_GROUPS, 2, MAX_BLOCKS
        ),
        params=np.stack([SamplingTensors.pack(seed=5), SamplingTensors.pack(temperature=0.5)]),
        recent=np.arange(2 * RECENT).reshape(2, RECENT),
        is_prompt=np.array([0, 1]),
        sample_mask=np.array([1, 0]),
    )


@pytest.mark.parametrize("num_tokens", [4, 6, 16])
def test_a_prefill_batch_is_padded_to_its_bucket(buffers: StepBuffers, num_tokens: int) -> None:
    batch = _prefill_batch()
    buffers.stage_prefill(batch, num_tokens)
    inputs = PrefillInputs.of(buffers.prefill_inputs, num_tokens, MAX_SEQS, buffers.table_size)
    tokens, seqs = num_tokens - 4, MAX_SEQS - 2
    assert inputs.ids.tolist() == [-1, 11, 12, 13] + [0] * tokens
    assert inputs.positions.tolist() == [7, 4, 5, 6] + [0] * tokens
    assert inputs.rows.tolist() == [2, 0, 0, 0] + [MAX_SEQS] * tokens
    assert inputs.logprob_targets.tolist()[:4] == [-1, 12, 13, VOCAB_SIZE - 1], "no such logit"
    assert inputs.num_logprobs.tolist() == [-1, 0, 2, 2] + [-1] * tokens
    assert inputs.seq_rows.tolist() == [2, 0] + [MAX_SEQS] * seqs
    assert inputs.seq_lens.tolist() == [8, 7] + [0] * seqs
    assert inputs.is_prompt.tolist() == [0, 1] + [0] * seqs
    assert inputs.sample_mask.tolist() == [1, 0] + [0] * seqs
    assert inputs.query_start.tolist() == [0, 1] + [4] * (seqs + 1)
    params = inputs.params.view(MAX_SEQS, -1).cpu().numpy()
    np.testing.assert_array_equal(params[:2], batch.params)
    assert not params[2:].any()
    recent = inputs.recent.view(MAX_SEQS, RECENT).cpu().numpy()
    np.testing.assert_array_equal(recent[:2], batch.recent)
    tables = inputs.block_tables.view(NUM_GROUPS, MAX_SEQS, MAX_BLOCKS).cpu().numpy()
    np.testing.assert_array_equal(tables[:, :2], batch.block_tables)
    assert (tables[:, 2:] == TRASH_PAGE).all()


def test_a_small_bucket_has_fewer_sequences(buffers: StepBuffers) -> None:
    buffers.stage_prefill(buffers.padding_batch(), 2)
    inputs = PrefillInputs.of(buffers.prefill_inputs, 2, MAX_SEQS, buffers.table_size)
    assert inputs.rows.tolist() == inputs.seq_rows.tolist() == [MAX_SEQS] * 2
    assert inputs.query_start.tolist() == [0] * 3
    assert not inputs.seq_lens.any()


@pytest.mark.parametrize("size", [2, 3, MAX_SEQS])
def test_a_decode_batch_is_padded_to_its_bucket(buffers: StepBuffers, size: int) -> None:
    batch = DecodeBatch(
        rows=np.array([3, 1]), patch_index=np.array([5, 20]), patch_page=np.array([7, 9])
    )
    buffers.stage_decode(batch)
    inputs = DecodeInputs.of(buffers.decode_inputs, size, MAX_SEQS)
    patches = NUM_GROUPS * size - 2
    trash_entry = MAX_SEQS * MAX_BLOCKS
    assert inputs.rows.tolist() == [3, 1] + [MAX_SEQS] * (size - 2)
    assert inputs.patch_index.tolist() == [5, 20] + [trash_entry] * patches
    assert inputs.patch_page.tolist() == [7, 9] + [TRASH_PAGE] * patches


def test_staging_leaves_earlier_copies_alone(buffers: StepBuffers) -> None:
    """A staging buffer is written again only when its last copy has been made."""
    for row in range(3):
        buffers.stage_decode(DecodeBatch(rows=np.array([row])))
        inputs = DecodeInputs.of(buffers.decode_inputs, 1, MAX_SEQS)
        assert inputs.rows.tolist() == [row]


def test_only_given_sampler_state_is_written(buffers: StepBuffers) -> None:
    bias = np.arange(VOCAB_SIZE, dtype=np.float32)
    SamplerState(bias=bias, bad_words=[[4], [1, 2, 3]]).write(buffers, 1)
    np.testing.assert_array_equal(buffers.bias[1].cpu().numpy(), bias)
    assert not buffers.bias[0].any()
    assert not buffers.counts.any()
    words = buffers.bad_words[1].cpu().numpy()
    assert words[0].tolist() == [-1] * 7 + [4]
    assert words[1].tolist() == [-1] * 5 + [1, 2, 3]
    assert (words[2:] == -1).all()
    SamplerState(counts=np.full(VOCAB_SIZE, 3, np.int32)).write(buffers, 1)
    assert (buffers.counts[1] == 3).all()
    np.testing.assert_array_equal(buffers.bias[1].cpu().numpy(), bias)


def test_packed_parameters_are_unpacked() -> None:
    packed = np.stack(
        [
            SamplingTensors.pack(
                seed=2**62, temperature=0.7, top_k=5, top_p=0.9, logprobs=3, counted=True
            ),
            SamplingTensors.pack(host_sampled=True),
        ]
    )
    params = SamplingTensors.unpack(torch.from_numpy(packed).to(DEVICE))
    assert params.seed.tolist() == [2**62, 0]
    assert params.top_k.tolist() == [5, 0]
    assert params.logprobs.tolist() == [3, -1]
    assert params.temperature.dtype == torch.float32
    torch.testing.assert_close(params.temperature.cpu(), torch.tensor([0.7, 0.0], device="cpu"))
    torch.testing.assert_close(params.top_p.cpu(), torch.tensor([0.9, 1.0], device="cpu"))
    assert params.counted.tolist() == [True, False]
    assert params.host_sampled.tolist() == [False, True]
