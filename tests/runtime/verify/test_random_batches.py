"""Random batches fit their buckets, and the uncompiled step of a bucket passes verification."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from compiled_llm import CompiledLLM
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.build_context import BuildContext
from compiled_llm.runtime.step.batch_inputs import TRASH_PAGE, DecodeBatch, PrefillBatch
from compiled_llm.runtime.verify.random_batches import BatchShape, make_random_batch
from compiled_llm.runtime.verify.snapshot import preserve
from compiled_llm.runtime.verify.staging import stage_random_batch
from compiled_llm.runtime.verify.verify import verify
from tests.conftest import DEVICE
from tests.helpers.tiny_models import small_config, tiny_model
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as shrunk_model

BUCKETS = [
    Bucket("decode", 4, "greedy"),
    Bucket("decode", 2, "full"),
    Bucket("prefill", 48, "random"),
    Bucket("prefill", 16, "scoring"),
]
EAGER = {"dispatch": "eager"}


@pytest.fixture(scope="module")
def context() -> Iterator[BuildContext]:
    """Windows and full attention."""
    config = small_config(compile=EAGER)
    with CompiledLLM(tiny_model("gemma2"), None, config, progress=False) as llm:
        yield llm.model_runner.context


@pytest.fixture(scope="module")
def context_with_states() -> Iterator[BuildContext]:
    model = shrunk_model(tiny_config("lfm2")).to(DEVICE)
    with CompiledLLM(model, None, small_config(compile=EAGER), progress=False) as llm:
        yield llm.model_runner.context


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", ["full", "random", "long"])
@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_a_batch_fits_its_bucket(
    context: BuildContext, bucket: Bucket, shape: BatchShape, seed: int
) -> None:
    memory, limits = context.memory, context.limits
    batch = make_random_batch(bucket, memory, limits, seed=seed, shape=shape)
    assert 0 < batch.num_new.sum() <= bucket.size
    assert (batch.num_cached + batch.num_new <= limits.max_model_len).all()
    rows = [*batch.rows.tolist(), *batch.idle_rows.tolist()]
    assert len(set(rows)) == len(rows) <= limits.max_num_seqs
    if isinstance(batch.batch, DecodeBatch):
        assert (batch.num_new == 1).all()
        assert (batch.num_cached >= 1).all()
    else:
        assert isinstance(batch.batch, PrefillBatch)
        assert len(batch.batch.ids) == batch.num_new.sum()
    if shape == "long":
        assert batch.num_cached[0] + batch.num_new[0] == limits.max_model_len
    for group, members in enumerate(memory.groups):
        used = batch.pages.used[group]
        assert set(used).isdisjoint({TRASH_PAGE})
        assert used.max() < members.num_pages
        new = batch.new_slots(group, memory.block_size)
        assert len(set(new)) == len(new) == batch.num_new.sum()
        assert set(new).isdisjoint(batch.cached_slots(group, memory.block_size))


def test_the_same_seed_gives_the_same_batch(context: BuildContext) -> None:
    bucket, buffers = BUCKETS[2], list(context.memory.state.buffers())
    staged = []
    for _ in range(2):
        batch = make_random_batch(bucket, context.memory, context.limits, seed=3, shape="random")
        with preserve(context.memory, batch):
            stage_random_batch(batch, context.memory, bucket.size)
            staged.append([buffer.clone() for buffer in buffers])
    assert all(torch.equal(*pair) for pair in zip(*staged, strict=True))


def test_only_cached_tokens_are_staged(context: BuildContext) -> None:
    batch = make_random_batch(BUCKETS[0], context.memory, context.limits, seed=1, shape="full")
    with preserve(context.memory, batch):
        stage_random_batch(batch, context.memory, BUCKETS[0].size)
        for group, members in enumerate(context.memory.groups):
            cache = context.memory.caches[members.layers[0]].k
            pages = torch.from_numpy(batch.pages.used[group]).to(cache.device)
            finite = cache[pages].isfinite().all(-1).all(-1).flatten().cpu().numpy()
            slots = (
                batch.pages.used[group][:, None] * cache.shape[1] + np.arange(cache.shape[1])
            ).reshape(-1)
            cached = batch.cached_slots(group, cache.shape[1])
            np.testing.assert_array_equal(np.sort(slots[finite]), np.sort(cached))


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_the_uncompiled_step_passes(context: BuildContext, bucket: Bucket) -> None:
    before = [buffer.clone() for buffer in context.memory.state.buffers()]
    found = verify(bucket, context.memory.step(context.model, bucket), context)
    assert found.failure is None
    assert found.agreement == 1.0
    assert all(
        torch.equal(*pair) for pair in zip(before, context.memory.state.buffers(), strict=True)
    )


@pytest.mark.parametrize("bucket", [Bucket("decode", 4, "full"), Bucket("prefill", 48, "full")])
def test_the_uncompiled_step_with_recurrent_states_passes(
    context_with_states: BuildContext, bucket: Bucket
) -> None:
    step = context_with_states.memory.step(context_with_states.model, bucket)
    assert verify(bucket, step, context_with_states).failure is None


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_a_step_that_does_nothing_fails(context: BuildContext, bucket: Bucket) -> None:
    assert verify(bucket, lambda: None, context).failure is not None
