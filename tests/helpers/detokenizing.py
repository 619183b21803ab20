"""Texts, and a detokenizer whose invariants are checked."""

from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from transformers import (
    PreTrainedTokenizerBase,
)

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.sampling_params import SamplingParams

TEXTS = {
    "ascii": "The quick brown fox jumps over the lazy dog.",
    "emoji": "Good 🙂🙃 morning 🥐!",
    "chinese": "早上好。世界。今天天气很好。",
    "joined": "👩‍👩‍👧‍👦 and 🏳️‍🌈 and 👍🏽",
    "combining": "e\u0301a\u0308 नमस्ते ﷽",
    "special": "<|im_start|>user\nhi 🙂<|im_end|>\n<|im_start|>assistant\n",
    "replacement": "a\ufffdb \ufffd\ufffd c",
    "spaces": "  two\n\n\tlines ,  and  . ",
}


BYTES = {byte: 10 + byte for byte in range(256)}


WORDS = {"<s>": 0, "▁Hello": 1, "▁world": 2, "s": 3}


unicode_text = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("🙂👩‍🏽é中 \n")),
    min_size=1,
    max_size=40,
)


property_test = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def byte_ids(text: str) -> list[int]:
    return [BYTES[byte] for byte in text.encode()]


def stream(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    *,
    prompt: Sequence[int] = (),
    **params: Any,
) -> tuple[Detokenizer, list[str]]:
    """Push one token at a time, take after each, and check invariants."""
    chosen = SamplingParams(**params)
    one, all_at_once = (
        Detokenizer(tokenizer, chosen, prompt),
        Detokenizer(tokenizer, chosen, prompt),
    )
    pieces, stopped = [], False
    for token in ids:
        stopped = one.push([token])
        pieces.append(one.take())
        assert one.text.startswith("".join(pieces))
    pieces.append(one.take(final=True))
    assert one.take(final=True) == ""
    assert all_at_once.push(ids) == stopped
    assert (all_at_once.text, all_at_once.num_tokens) == (one.text, one.num_tokens)
    assert "".join(pieces) == all_at_once.take(final=True) == one.text
    return one, pieces
