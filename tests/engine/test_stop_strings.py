"""Stop strings cut the text, and their beginnings are held back."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    PreTrainedTokenizerBase,
)

from compiled_llm.engine.detokenizer import Detokenizer
from compiled_llm.sampling_params import SamplingParams
from tests.helpers.detokenizing import encode, property_test, stream, unicode_text


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
