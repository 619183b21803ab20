"""Verification catches steps that are wrong in one place."""

from collections.abc import Callable

import pytest
import torch

from compiled_llm import CompiledLLM
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.verify.verify import ALLOWED, verify
from tests.helpers.tiny_models import small_config, tiny_model
from tests.runtime.verify.conftest import BUCKETS, launch_of


def _wrong_token(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    launch()
    llm.model_runner.memory.state.tokens.add_(1)


def _wrong_length(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    """A decode step attends to one token less; a prefill step computes another prompt."""
    state = llm.model_runner.memory.state
    state.positions.sub_(1).clamp_(min=0)
    state.prefill_inputs[:1].add_(1)
    launch()


def _wrong_page(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    launch()
    for cache in llm.model_runner.memory.caches:
        cache.v[1:, -1] = 7.0


def _writes_nothing(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    kept = [cache.k.clone() for cache in llm.model_runner.memory.caches]
    launch()
    for cache, before in zip(llm.model_runner.memory.caches, kept, strict=True):
        cache.k.copy_(before)


def _drops_a_layer(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    """Drop the output of the last layer, which still writes its keys and values."""
    weight = llm.model.model.layers[-1].self_attn.o_proj.weight
    kept = weight.clone()
    weight.zero_()
    launch()
    weight.copy_(kept)


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
@pytest.mark.parametrize(
    "fault", [_wrong_token, _wrong_length, _wrong_page, _writes_nothing, _drops_a_layer]
)
def test_wrong_buckets_are_caught(
    llm: CompiledLLM, bucket: Bucket, fault: Callable[[CompiledLLM, Callable[[], object]], None]
) -> None:
    launch, context = launch_of(llm, bucket), llm.model_runner.context
    with torch.no_grad():
        found = verify(bucket, lambda: fault(llm, launch), context)
    assert found.failure is not None
    assert verify(bucket, launch, context).failure is None


def _keeps_old_states(states: list[torch.Tensor], launch: Callable[[], object]) -> None:
    kept = [slots.clone() for slots in states]
    launch()
    for slots, before in zip(states, kept, strict=True):
        slots.copy_(before)


def _resets_states(states: list[torch.Tensor], launch: Callable[[], object]) -> None:
    for slots in states:
        slots.zero_()
    launch()


def _writes_all_states(states: list[torch.Tensor], launch: Callable[[], object]) -> None:
    launch()
    for slots in states:
        slots.nan_to_num_()


@pytest.mark.parametrize(
    "bucket", [Bucket("prefill", 48, "full"), Bucket("decode", 4, "full")], ids=str
)
@pytest.mark.parametrize("fault", [_keeps_old_states, _resets_states, _writes_all_states])
def test_wrong_states_are_caught(
    llm_with_states: CompiledLLM,
    bucket: Bucket,
    fault: Callable[[list[torch.Tensor], Callable[[], object]], None],
) -> None:
    context, launch = llm_with_states.model_runner.context, launch_of(llm_with_states, bucket)
    assert context.memory.states is not None
    slots = context.memory.states.slots
    found = verify(bucket, lambda: fault(slots, launch), context)
    assert found.failure is not None


@pytest.mark.parametrize("token", [-1, 160])
def test_an_id_outside_the_vocabulary_is_caught(llm: CompiledLLM, token: int) -> None:
    """A step reports -1 for a row whose logits are not finite; it is not used as an index."""
    bucket, state = BUCKETS[4], llm.model_runner.memory.state

    def launch() -> None:
        launch_of(llm, bucket)()
        state.ring_tokens.fill_(token)

    found = verify(bucket, launch, llm.model_runner.context)
    assert found.failure == "it chose tokens outside the vocabulary, or none"

    def launch_feeding_it() -> None:
        launch()
        state.tokens.fill_(token)

    found = verify(bucket, launch_feeding_it, llm.model_runner.context)
    assert str(found.failure).startswith("it chose tokens outside the vocabulary, or none")


def test_reporting_other_tokens_is_caught(llm: CompiledLLM) -> None:
    bucket = BUCKETS[4]

    def launch() -> None:
        launch_of(llm, bucket)()
        llm.model_runner.memory.state.ring_tokens.add_(1).remainder_(160)

    found = verify(bucket, launch, llm.model_runner.context)
    assert found.failure == "it reported other tokens than those that its rows feed next"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_correct_and_wrong_are_far_apart(dtype: torch.dtype) -> None:
    config = small_config(buckets={"decode": [4], "prefill": [], "samplers": ["full"]}, verify=True)
    bucket = Bucket("decode", 4, "full")
    with CompiledLLM(tiny_model("llama").to(dtype), None, config, progress=False) as llm:
        correct = llm.report().buckets[0].verification
        assert correct is not None
        assert correct.failure is None
        assert correct.error < ALLOWED[dtype] / 4
        with torch.no_grad():
            wrong = verify(
                bucket,
                lambda: _wrong_length(llm, launch_of(llm, bucket)),
                llm.model_runner.context,
            )
        assert wrong.error > 2 * ALLOWED[dtype]
