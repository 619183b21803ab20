"""Streams of tokens: incomplete characters, spaces, invalid bytes and slow tokenizers."""

from typing import Any

import pytest
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
)

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.sampling_params import SamplingParams
from tests.helpers.detokenizing import BYTES, byte_ids, encode, stream


def test_a_space_before_the_first_word_is_kept(sentencepiece: PreTrainedTokenizerBase) -> None:
    assert sentencepiece.decode([2, 3]) == "worlds"
    assert stream(sentencepiece, [2, 3], prompt=[0, 1])[0].text == " worlds"
    assert stream(sentencepiece, [2, 3], prompt=[0])[0].text == "worlds"
    assert stream(sentencepiece, [2, 3])[0].text == "worlds"
    assert stream(sentencepiece, [0, 2, 0], prompt=[1])[0].text == " world"


@pytest.mark.parametrize("size", range(1, 5))
def test_the_prompt_may_end_within_a_character(
    tokenizer: PreTrainedTokenizerBase, sentencepiece: PreTrainedTokenizerBase, size: int
) -> None:
    whole = byte_ids("中文🙂")
    prompt, rest = whole[: 6 + size], whole[6 + size :]
    assert stream(sentencepiece, [*rest, 2], prompt=prompt)[0].text == (
        "🙂 world" if rest else " world"
    )
    assert stream(sentencepiece, [1, 2], prompt=[1, *prompt[6:]])[0].text == " Hello world"
    ids, hello = encode(tokenizer, "中文👩"), encode(tokenizer, " hello")
    prompt, rest = ids[:-size], ids[-size:]
    assert "中文👩".endswith(
        stream(tokenizer, [*rest, *hello], prompt=prompt)[0].text.removesuffix(" hello")
    )
    assert stream(tokenizer, hello, prompt=prompt)[0].text == " hello"


def test_nothing_of_the_prompt_is_given(tokenizer: PreTrainedTokenizerBase) -> None:
    for end in ("\ufffd", "\ufffd" * 5, "a\ufffd", "🙂\ufffd", "<|im_end|>", "\n"):
        prompt = encode(tokenizer, f"The prompt{end}")
        assert stream(tokenizer, encode(tokenizer, "b 🙂"), prompt=prompt)[0].text == "b 🙂"


def test_bytes_after_a_window_that_begins_within_a_character(
    sentencepiece: PreTrainedTokenizerBase,
) -> None:
    for text in ("中文字中文字", "🙂🙃🙂🙃"):
        assert (
            stream(sentencepiece, [*byte_ids("文"), 2], prompt=byte_ids(text))[0].text == "文 world"
        )


def test_bytes_that_are_no_character_do_not_end_the_stream(
    sentencepiece: PreTrainedTokenizerBase,
) -> None:
    ids = [
        1,
        *byte_ids("🙂"),
        BYTES[0xE4],
        3,
        2,
    ]  # the lone byte undoes the emoji, whose text was given
    assert stream(sentencepiece, ids)[0].text == "Hello🙂s world"


def test_an_incomplete_character_at_the_end_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(tokenizer, "good 🙂")
    assert stream(tokenizer, ids[:-1])[0].text == "good"


def test_a_tokenizer_without_a_backend() -> None:
    slow = ByT5Tokenizer()
    assert not hasattr(slow, "backend_tokenizer")
    text = "naïve 🙂 中文 . done"
    ids = encode(slow, text)
    prompt = encode(slow, "prompt 中")
    detokenizer, pieces = stream(slow, ids, prompt=prompt)
    assert detokenizer.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream(slow, ids, prompt=prompt[:-1], stop="中")[0].text == "naïve 🙂 "


def test_a_slow_tokenizer_that_marks_incomplete_characters() -> None:
    class Slow:
        def decode(self, ids: list[int], **_: object) -> str:
            return bytes(ids).decode(errors="replace")

    slow: Any = Slow()
    whole = "é🙂 中".encode()
    assert stream(slow, whole)[0].text == "é🙂 中"
    assert stream(slow, whole[:-1])[0].text == "é🙂 "
    assert stream(slow, whole[3:], prompt=whole[:3])[0].text == "🙂 中"
    assert stream(slow, b"ok", prompt=whole[:3])[0].text == "ok"


def test_a_slow_tokenizer_decodes_a_bounded_number_of_tokens_at_once() -> None:
    decoded: list[int] = []

    class Slow:
        def decode(self, ids: list[int], **_: object) -> str:
            decoded.append(len(ids))
            if any(token >= 200 for token in ids):
                raise IndexError("piece id is out of range.")
            return "".join(f" {token}" for token in ids).removeprefix(
                " "
            )  # as sentencepiece leaves out the first space

    ids = [7 + number % 150 for number in range(2000)]
    slow: Any = Slow()
    detokenizer = Detokenizer(slow, SamplingParams(), [3, 201, 5])
    for token in ids:
        detokenizer.push([token])
        detokenizer.push([200])  # has no text, and is left out
    assert detokenizer.text == "".join(f" {token}" for token in ids)
    assert max(decoded) <= 66
    assert len(decoded) < 3.5 * 2 * len(ids)
