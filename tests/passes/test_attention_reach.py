"""Tests of `AttentionReach`."""

import pytest
import torch

from passes.attention_reach import FULL, AttentionReach

REACHES = [FULL, AttentionReach.sliding(5), AttentionReach.chunked(4)]


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_an_encoded_reach_decodes_to_itself(reach: AttentionReach) -> None:
    assert AttentionReach.decode(reach.encode()) == reach


@pytest.mark.parametrize(
    ("reach", "expected"),
    list(zip(REACHES, ([0, 0, 0], [-4, 0, 5], [0, 4, 8]), strict=True)),
    ids=str,
)
def test_first_visible_token(reach: AttentionReach, expected: list[int]) -> None:
    positions = [0, 4, 9]
    assert [reach.first_visible(position) for position in positions] == expected
    assert reach.first_visible(torch.tensor(positions)).tolist() == expected


def test_only_full_reach_is_full() -> None:
    assert [reach.is_full for reach in REACHES] == [True, False, False]


def test_a_reach_is_described_in_words() -> None:
    assert [str(reach) for reach in REACHES] == ["all tokens", "window of 5", "chunks of 4"]
