"""Tests of mask probes: causal, sliding, chunked and unsupported masks."""

from types import SimpleNamespace

import pytest
import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from compiled_llm.models.mask_probe import MASK_PROBE_NAME, probed_reach
from passes.attention_reach import FULL, AttentionReach

EMBEDS = torch.zeros(1, 4, 8)


def _config(**values: object) -> SimpleNamespace:
    return SimpleNamespace(
        _attn_implementation=MASK_PROBE_NAME, sliding_window=5, attention_chunk_size=6, **values
    )


@pytest.mark.parametrize("mask", [None, torch.ones(1, 4)])
def test_masks_of_transformers_are_recognised(mask: torch.Tensor | None) -> None:
    for create, reach in [
        (create_causal_mask, FULL),
        (create_sliding_window_causal_mask, AttentionReach.sliding(5)),
        (create_chunked_causal_mask, AttentionReach.chunked(6)),
    ]:
        assert probed_reach(create(_config(), EMBEDS, mask, None)) == reach


def test_other_masks_have_no_reach() -> None:
    def every_second(
        batch: object, head: object, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (query - key) % 2 == 0

    bidirectional = create_causal_mask(_config(is_causal=False), EMBEDS, None, None)
    gaps = create_causal_mask(_config(), EMBEDS, None, None, and_mask_function=every_second)
    first_two = torch.tensor([[7, 7, -1, -1]])  # as for an image
    block = create_causal_mask(
        _config(), EMBEDS, torch.ones(1, 4), None, block_sequence_ids=first_two
    )
    assert [probed_reach(mask) for mask in (bidirectional, gaps, block)] == [None, None, None]


def test_a_mask_that_looks_up_token_types_is_probed_with_text() -> None:
    text = torch.full((1, 4), -1)
    assert (
        probed_reach(
            create_causal_mask(_config(), EMBEDS, torch.ones(1, 4), None, block_sequence_ids=text)
        )
        == FULL
    )
    assert probed_reach(
        create_sliding_window_causal_mask(
            _config(), EMBEDS, torch.ones(1, 4), None, block_sequence_ids=text
        )
    ) == AttentionReach.sliding(5)


def test_steps_have_no_mask() -> None:
    assert "compiled_llm" not in ALL_MASK_ATTENTION_FUNCTIONS
    config = SimpleNamespace(_attn_implementation="compiled_llm")
    assert create_causal_mask(config, EMBEDS, torch.ones(1, 4), None) is None
