"""Stop strings and stop tokens end a completion and cut its text."""

import pytest

from compiled_llm import CompiledLLM
from tests.helpers.byte_model import (
    ASCII,
    BOS,
    EOS,
    NO_ASCII,
    TOKENIZER,
    VOCAB,
    Force,
    Reference,
    encode,
    greedy,
    spoken,
)
from tests.helpers.tiny_models import prompt_of

pytestmark = pytest.mark.gpu


STOPS = [
    ("Hello world, hello", ["world"]),
    ("Hello world, hello", ["o", "lo w"]),
    ("Hello world, hello", ["hello"]),
    ("Hello world, hello", ["nothing of the kind"]),
    ("Hello", ["Hello"]),
    ("so 🙂🙃 nice", ["🙃"]),
    ("so 🙂🙃 nice", ["🙂🙃 n", "very"]),
    ("早上好。世界。今天天气很好。", ["。今"]),
    ("早上好。世界。今天天气很好。", ["天天"]),
    ("naïve café 👩‍👩‍👧", ["fé 👩\u200d"]),
    ("aaab", ["aab"]),
]


@pytest.mark.parametrize(("text", "stops"), STOPS)
def test_stop_strings(llm: CompiledLLM, text: str, stops: list[str]) -> None:
    """Each byte is a token, so that stop strings end within characters."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    end, start = min(found, default=(len(text), len(text)))
    reason = "stop" if found else "length"
    for include in (False, True):
        output = spoken(llm, text, stop=stops, include_stop_str_in_output=include, logprobs=1)
        assert output.text == text[: end if include else start]
        assert output.token_ids == encode(text[:end])
        assert output.finish_reason == reason
        assert output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids)
    pieces = llm.stream(
        "Say: ",
        greedy(logits_processors=[Force(encode("Say: "), encode(text))], stop=stops, max_tokens=50),
    )
    assert "".join(pieces) == (
        text[:start] if found else (text * 50).encode()[:50].decode(errors="ignore")
    )


def test_stop_strings_of_tokens_chosen_in_the_graph(llm: CompiledLLM, reference: Reference) -> None:
    """The step launched before the end was known has no effect; other requests continue."""
    prompt = encode("One, two, ")
    expected = reference(prompt, 24, suppress_tokens=NO_ASCII)
    text = TOKENIZER.decode(expected)
    stop = text[6:9]
    end = text.find(stop) + 3
    params = [
        greedy(allowed_token_ids=ASCII, stop=stop, min_tokens=least) for least in (0, end, 24)
    ]
    first, later, never, other = llm.generate([prompt] * 3 + [prompt_of(30)], [*params, greedy()])
    assert (first.text, first.outputs[0].token_ids) == (text[: end - 3], expected[:end])
    again = text.find(stop, end - 2)
    assert later.text == (text if again < 0 else text[:again])
    assert (never.text, never.outputs[0].token_ids) == (text, expected)
    assert [output.outputs[0].finish_reason for output in (first, never, other)] == [
        "stop",
        "length",
        "length",
    ]
    assert other.outputs[0].token_ids == reference(prompt_of(30), 24)


def test_stopping_tokens(llm: CompiledLLM) -> None:
    a, b, c = encode("abc")
    said = [a, BOS, b, EOS, c, c]
    output = spoken(llm, "", tokens=said, ignore_eos=False)
    assert (output.text, output.token_ids, output.finish_reason) == ("ab", said[:4], "stop")
    output = spoken(llm, "", tokens=said)
    assert (output.text, output.token_ids, output.finish_reason) == ("abcc", said, "length")
    output = spoken(llm, "", tokens=said, skip_special_tokens=False)
    assert (output.text, output.token_ids, output.finish_reason) == ("a<s>b</s>cc", said, "length")
    output = spoken(llm, "", tokens=said, stop="</s>c", skip_special_tokens=False)
    assert (output.text, output.token_ids, output.finish_reason) == ("a<s>b", said[:5], "stop")
    output = spoken(
        llm,
        "",
        tokens=said,
        stop_token_ids=[BOS],
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    assert (output.text, output.token_ids, output.finish_reason) == ("a<s>", said[:2], "stop")
    output = spoken(llm, "", tokens=said, stop_token_ids=range(3, VOCAB), ignore_eos=True)
    assert (output.token_ids, output.finish_reason) == (said[:1], "stop")
    output = spoken(llm, "", tokens=said, stop_token_ids=[c], max_tokens=5)
    assert (output.token_ids, output.finish_reason) == (
        said[:5],
        "stop",
    )  # both at once: it has come to an end
