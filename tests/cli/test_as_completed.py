"""Tests of `CompiledLLM.as_completed`."""

from collections.abc import Iterator

import pytest

from compiled_llm import CompiledLLM, SamplingParams


def test_outputs_are_yielded_on_completion_and_prompts_are_read_lazily(
    llm: CompiledLLM,
) -> None:
    read: list[int] = []

    def prompts() -> Iterator[tuple[str, SamplingParams]]:
        for number in range(40):
            read.append(number)
            yield (
                f"prompt {number}",
                SamplingParams(temperature=0, max_tokens=24 if number == 0 else 3, ignore_eos=True),
            )

    outputs = llm.as_completed(prompts())
    first, _ = next(outputs)
    assert 0 < first < 4
    assert len(read) < 16  # four run, four wait
    order = [first, *(number for number, _ in outputs)]
    assert sorted(order) == list(range(40))
    assert order.index(0) > 12
    abandoned = llm.as_completed(prompts())
    next(abandoned)
    abandoned.close()
    while llm.engine.has_work:
        assert all(request.finish_reason == "abort" for request in llm.engine.step())
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(llm.as_completed([("fine", None), ([], None)]))
    llm.engine.cache.check()


def test_steps_of_other_iterators_lose_no_output(llm: CompiledLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = "".join(llm.stream("abc", params))
    stream = llm.stream("abc", params)
    outputs = llm.as_completed(
        [("one", SamplingParams(temperature=0, max_tokens=2)), ("abc", params), ("abc", params)]
    )
    text, numbers = next(stream), [next(outputs)[0]]
    llm.generate("hello", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    assert text + "".join(stream) == expected
    assert sorted([*numbers, *(number for number, _ in outputs)]) == [0, 1, 2]
