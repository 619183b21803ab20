"""Lengths that the measurements reserve, and options of the command line."""

import pytest

from bench.decode import DecodeSettings
from bench.latency import LatencySettings
from bench.options import parse_names, parse_numbers, parse_range


def test_latency_lead_covers_the_prefill_of_all_prompts() -> None:
    settings = LatencySettings(batches=[1, 8], context=16384, steps=50, rounds=5)
    assert settings.lead(8, 2048) == 4 + 64
    assert settings.max_sequence_length(2048) == 16384 + 68 + 50


def test_decode_sequences_outlast_all_rounds() -> None:
    settings = DecodeSettings(context=100, steps=10, rounds=3)
    assert settings.max_sequence_length(4, 64) == 100 + 2 + 10 * (3 + 2) + 7


def test_lists_and_ranges_are_parsed() -> None:
    assert parse_names(" ours, vllm,") == ["ours", "vllm"]
    assert parse_numbers("1,8, 32", "--batch") == [1, 8, 32]
    assert parse_range("100-1024", "--prompt-lengths") == (100, 1024)


@pytest.mark.parametrize("text", ["", "0", "1,-2", "1.5"])
def test_numbers_must_be_positive_integers(text: str) -> None:
    with pytest.raises(ValueError, match=r"--batch .*: expected positive numbers"):
        parse_numbers(text, "--batch")


@pytest.mark.parametrize("text", ["", "5", "9-3", "0-3", "1-2-3", "a-b"])
def test_ranges_have_two_ordered_ends(text: str) -> None:
    with pytest.raises(ValueError, match=r"--output-lengths .*: expected two numbers"):
        parse_range(text, "--output-lengths")
