"""Conversion of prompts to requests, and the construction of outputs."""

from typing import Any

import pytest

from compiled_llm import SamplingParams
from compiled_llm.engine.output_builder import OutputBuilder, RequestGroup
from compiled_llm.engine.processor import RequestProcessor
from compiled_llm.outputs import CompletionOutput, ListPrefix, Logprob
from tests.helpers.letters import Letters


class Broken(Letters):
    """Tokenizer whose `decode` raises."""

    def decode(self, ids: list[int], **_: object) -> str:
        raise ValueError("no text today")


class PanicException(BaseException):  # as Rust code raises it
    __module__ = "pyo3_runtime"


class Panicking(Letters):
    def decode(self, ids: list[int], **_: object) -> str:
        if 7 in ids:
            raise PanicException("index out of bounds")
        return super().decode(ids)


def processor_of(tokenizer: Any, max_model_len: int = 8) -> RequestProcessor:
    return RequestProcessor(tokenizer, None, max_model_len=max_model_len)


def finish(group: RequestGroup, token_ids: list[int]) -> None:
    for request in group.requests:
        request.token_ids, request.finish_reason = token_ids, "length"


def test_a_text_that_is_far_too_long_is_refused_by_its_beginning() -> None:
    letters = Letters()
    with pytest.raises(
        ValueError,
        match=r"the prompt has 10000000 characters, and its first 128 are 128 tokens already; ",
    ):
        processor_of(letters).process("a" * 10_000_000)
    assert letters.lengths == [128]


def test_a_text_of_few_tokens_is_tokenised_whatever_its_length() -> None:
    letters = Letters()
    assert processor_of(letters).process(" " * 100_000 + "abc").requests[0].prompt_token_ids == [
        19,
        20,
        21,
    ]
    assert sum(letters.lengths) < 2 * 100_003


def test_more_completions_than_any_engine_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="n must be a whole number from 1 to 16384, got 300000"):
        SamplingParams(n=300_000)


def test_ids_that_the_tokenizer_does_not_know_have_no_text() -> None:
    outputs = OutputBuilder(Letters())  # type: ignore[arg-type]
    assert [outputs.decode_token(token) for token in (3, 26, 999)] == ["d", "", ""]
    group = processor_of(Letters()).process([4, 99, 5])
    finish(group, [1, 50, 2, 99, 3])
    output = outputs.build(group).outputs[0]
    assert (output.text, output.token_ids, output.error) == ("bcd", [1, 50, 2, 99, 3], None)


@pytest.mark.parametrize(
    ("tokenizer", "error"),
    [
        (Broken(), "ValueError: no text today"),
        (Panicking(), "RuntimeError: the tokenizer failed: index out of bounds"),
    ],
)
def test_a_tokenizer_that_fails_ends_the_request_with_an_error(tokenizer: Any, error: str) -> None:
    outputs, group = OutputBuilder(tokenizer), processor_of(tokenizer).process([4])
    finish(group, [1, 7])
    output = outputs.build(group).outputs[0]
    assert (output.finish_reason, output.error) == ("error", error)
    with pytest.raises((ValueError, RuntimeError)):
        outputs.decode_token(7)


class CountingList(list[Any]):
    """List that counts the items copied out of it."""

    copied = 0

    def __iter__(self) -> Any:
        type(self).copied += len(self)
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        type(self).copied += len(found) if isinstance(index, slice) else 0
        return found


def test_an_output_that_is_not_read_copies_no_tokens() -> None:
    group = processor_of(None, max_model_len=10_000).process(
        list(range(5000)), SamplingParams(logprobs=1), streaming=True
    )
    builder, request = OutputBuilder(None), group.requests[0]
    request.prompt_token_ids, request.token_ids, request.logprobs = (
        CountingList(range(n)) for n in (5000, 3000, 3000)
    )
    outputs = []
    for token in range(10):
        outputs.append(builder.build(group))
        request.token_ids.append(token)
        request.logprobs.append({})
    assert CountingList.copied == 0
    for number, output in enumerate(outputs):
        completion = output.outputs[0]
        assert completion.token_ids == [*range(3000), *range(number)]
        assert completion.token_ids is completion.token_ids
        assert completion.logprobs is not None
        assert len(completion.logprobs) == 3000 + number
        assert output.prompt_token_ids is outputs[0].prompt_token_ids
    outputs[0].prompt_token_ids.clear()  # whoever changes an output changes no request
    outputs[0].outputs[0].token_ids.clear()
    assert (len(request.prompt_token_ids), len(request.token_ids)) == (5000, 3010)


def test_outputs_compare_and_print_as_what_they_hold() -> None:
    logprobs = [{1: Logprob(logprob=-0.5, rank=1)}]
    lazy = CompletionOutput(
        index=0,
        text="a",
        token_ids=ListPrefix([1, 2, 3], 2),
        logprobs=ListPrefix(logprobs, 1),
        finish_reason=None,
    )
    plain = CompletionOutput(
        index=0, text="a", token_ids=[1, 2], logprobs=logprobs, finish_reason=None
    )
    assert repr(lazy) == repr(plain)
    assert lazy == plain
