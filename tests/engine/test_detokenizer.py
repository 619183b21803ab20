"""Incremental detokenisation: whole characters, stop strings wherever they fall, on real and on awkward tokenizers."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.models.default_model import default_model
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


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    path = default_model()
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name
    )
    return loaded


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerBase:
    """Words with a space before them and single bytes, decoded as Llama 2 does."""
    backend = Tokenizer(
        models.WordLevel(
            {**WORDS, **{f"<0x{byte:02X}>": id for byte, id in BYTES.items()}}, unk_token="<s>"
        )
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


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
    """Push one token at a time, take after each, and check what must always hold."""
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


@property_test
@given(text=unicode_text, data=st.data())
def test_any_stop_string_cuts(
    tokenizer: PreTrainedTokenizerBase, text: str, data: st.DataObject
) -> None:
    ids = encode(tokenizer, text)
    decoded = str(tokenizer.decode(ids))
    assume("\ufffd" not in decoded)
    start = data.draw(st.integers(0, len(decoded) - 1))
    stop = decoded[start : data.draw(st.integers(start + 1, len(decoded)))]
    found = decoded.find(stop)
    cut, _ = stream(tokenizer, ids, stop=stop, skip_special_tokens=False)
    assert cut.text == decoded[:found]
    kept, _ = stream(
        tokenizer, ids, stop=[stop], include_stop_str_in_output=True, skip_special_tokens=False
    )
    assert kept.text == decoded[: found + len(stop)]
    assert kept.num_tokens == cut.num_tokens
    before = str(tokenizer.decode(ids[: cut.num_tokens - 1], skip_special_tokens=False))
    assert stop not in before or before.endswith(
        "\ufffd"
    )  # with a character's first bytes, their token's text waits


@property_test
@given(
    text=st.text("abc ", min_size=1),
    stops=st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_stop_strings_do_not_depend_on_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, stops: list[str]
) -> None:
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    assert stream(tokenizer, encode(tokenizer, text), stop=stops)[0].text == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("The quick brown fox jumps", "brown fox", "The quick "),  # across tokens
        ("The quick brown fox jumps", "n f", "The quick brow"),  # within both of its tokens
        ("The quick brown fox jumps", "The", ""),
        ("The quick brown fox jumps", "jumps", "The quick brown fox "),
        ("so 🙂🙃 nice", "🙃", "so 🙂"),  # a character of several tokens
        ("so 🙂🙃 nice", "🙂🙃 n", "so "),
        ("aaab", "aab", "a"),
        ("one two three four", ["four", "two", "three"], "one "),
        ("one two three four", ["two three", "o th", "three"], "one tw"),  # the one that ends first
        (
            "one two three four",
            ["three", "two three"],
            "one ",
        ),  # of those that end together, the longest
    ],
)
def test_stop_strings(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: str | list[str], expected: str
) -> None:
    detokenizer, _ = stream(tokenizer, encode(tokenizer, text), stop=stop)
    assert detokenizer.text == expected


def test_the_tokens_up_to_the_stop_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(tokenizer, "one two three four five")
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="hre"), [])
    assert [detokenizer.push([token]) for token in ids] == [False, False, True, True, True]
    assert (detokenizer.num_tokens, detokenizer.text) == (3, "one two t")
    assert detokenizer.push(ids)
    assert (detokenizer.num_tokens, detokenizer.text) == (3, "one two t")


def test_what_may_become_a_stop_string_is_held_back(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=["abc", "bd"]), [])
    for text, shown in [
        ("xa", "x"),
        ("b", ""),
        ("xab", "abx"),
        ("b", "ab"),
        ("z", "bz"),
        ("a", ""),
    ]:
        assert not detokenizer.push(encode(tokenizer, text))
        assert detokenizer.take() == shown
    assert detokenizer.text == "xabxabbza"
    assert detokenizer.take(final=True) == "a"
    included = Detokenizer(
        tokenizer, SamplingParams(stop="abc", include_stop_str_in_output=True), []
    )
    included.push(encode(tokenizer, "xa"))
    assert included.take() == "xa"
    assert included.push(encode(tokenizer, "bc"))
    assert included.take() == "bc"


def test_no_stop_string_ends_within_min_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(tokenizer, "one two one two one")
    assert len(ids) == 5
    ends = {
        least: stream(
            tokenizer, ids, stop="one", min_tokens=least, include_stop_str_in_output=True
        )[0]
        for least in range(6)
    }
    assert [end.num_tokens for end in ends.values()] == [1, 3, 3, 5, 5, 5]
    assert [end.text for end in ends.values()] == [
        "one",
        *["one two one"] * 2,
        *["one two one two one"] * 3,
    ]
    across, _ = stream(tokenizer, ids, stop="one two", min_tokens=1)
    assert across.text == ""


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


def test_exceptions_of_the_tokenizer_reach_the_caller(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer, SamplingParams(), [])
    with pytest.raises(TypeError):
        detokenizer.push([-1])


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
