"""Incremental detokenization: whole characters, the same text for any division into tokens."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    PreTrainedTokenizerBase,
)

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.sampling_params import SamplingParams
from tests.helpers.detokenizing import TEXTS, encode, property_test, stream, unicode_text


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    text = TEXTS[name]
    ids = encode(tokenizer, text)
    detokenizer, pieces = stream(
        tokenizer, ids, prompt=encode(tokenizer, "Say:"), skip_special_tokens=False
    )
    assert detokenizer.text == text
    assert detokenizer.num_tokens == len(ids)
    assert sum(piece != "" for piece in pieces) > 3
    if name != "replacement":
        assert not any("\ufffd" in piece for piece in pieces)
    plain, _ = stream(tokenizer, ids)
    assert plain.text == tokenizer.decode(ids, skip_special_tokens=True)


@property_test
@given(text=unicode_text, prompt=unicode_text)
def test_any_text_survives(tokenizer: PreTrainedTokenizerBase, text: str, prompt: str) -> None:
    ids = encode(tokenizer, text)
    decoded = str(tokenizer.decode(ids))
    assume("\ufffd" not in decoded)
    assert (
        stream(tokenizer, ids, prompt=encode(tokenizer, prompt), skip_special_tokens=False)[0].text
        == decoded
    )


@property_test
@given(
    ids=st.lists(st.integers(0, 49_200), min_size=1, max_size=30),
    prompt=st.lists(st.integers(0, 49_151), max_size=10),
)
def test_any_tokens_give_a_prefix_of_what_they_decode_to(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt: list[int]
) -> None:
    assert str(tokenizer.decode(ids)).startswith(
        stream(tokenizer, ids, skip_special_tokens=False)[0].text
    )
    stream(tokenizer, ids, prompt=prompt)


def test_exceptions_of_the_tokenizer_reach_the_caller(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer, SamplingParams(), [])
    with pytest.raises(TypeError):
        detokenizer.push([-1])
