"""Logits processors and streamers of transformers, and metrics of outputs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from compiled_llm import CompiledLLM
from tests.helpers.byte_model import (
    ASCII,
    TOKENIZER,
    VOCAB,
    Reference,
    check_logprobs,
    complete,
    drawn,
    encode,
    greedy,
    tokens_of,
)
from tests.helpers.tiny_models import prompt_of

pytestmark = pytest.mark.gpu


def test_logits_processors_of_transformers(llm: CompiledLLM) -> None:
    words = [[40, 50], encode("e"), [30, 31, 32]]
    repetition, bans = RepetitionPenaltyLogitsProcessor(1.4), NoBadWordsLogitsProcessor(words)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(10)])
    pairs = [
        (greedy(logits_processors=[repetition]), greedy(repetition_penalty=1.4)),
        (
            greedy(logits_processors=[bans, repetition]),
            greedy(logits_processors=[bans], repetition_penalty=1.4),
        ),
        (drawn(logits_processors=warpers), drawn(temperature=0.7, top_k=10)),
        (drawn(logits_processors=warpers, min_p=0.1), drawn(temperature=0.7, top_k=10, min_p=0.1)),
    ]
    for prompt in (prompt_of(9), prompt_of(70)):
        for outside, inside in pairs:
            assert tokens_of(llm, [prompt], outside) == tokens_of(llm, [prompt], inside)
        together = tokens_of(llm, [prompt] * 8, [params for pair in pairs for params in pair])
        assert together[::2] == together[1::2]


def test_what_a_logits_processor_is_given(llm: CompiledLLM, reference: Reference) -> None:
    """It gets all ids so far and the logits; writing to these leaves the logprobs unchanged."""
    prompt, seen = prompt_of(70), []

    def record(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append((ids.clone(), logits.clone()))
        logits[:, logits.argmax()] = -100.0
        return logits

    others = [drawn(logprobs=2), greedy(repetition_penalty=1.3), drawn(n=2)]
    prompts = [prompt_of(20), prompt_of(33), prompt_of(5)]
    before = llm.report().scheduling.processor_calls
    expected = llm.generate(prompts, others)
    assert llm.report().scheduling.processor_calls == before
    mixed = llm.generate(
        [*prompts, prompt], [*others, greedy(logits_processors=[record], logprobs=3)]
    )
    output = mixed.pop().outputs[0]
    assert llm.report().scheduling.processor_calls == before + 24 == before + len(seen)
    assert [[each.token_ids for each in other.outputs] for other in mixed] == [
        [e.token_ids for e in o.outputs] for o in expected
    ]
    everything = [*prompt, *output.token_ids]
    logits = reference.logits(everything)[len(prompt) - 1 : -1]
    for number, (ids, given) in enumerate(seen):
        assert ids.dtype == torch.int64
        assert ids.tolist() == [everything[: len(prompt) + number]]
        torch.testing.assert_close(given[0].cpu(), logits[number], rtol=1e-4, atol=1e-5)
    assert output.token_ids == logits.topk(2).indices[:, 1].tolist()
    assert output.logprobs is not None
    check_logprobs(output.logprobs, output.token_ids, logits, 3)


def test_a_failing_logits_processor_ends_its_request_alone(
    llm: CompiledLLM, reference: Reference
) -> None:
    prompt = prompt_of(20)

    def fails(ids: Tensor, logits: Tensor) -> Tensor:
        if ids.shape[1] == len(prompt) + 3:
            raise KeyError("nothing found")
        return logits

    faults: list[Any] = [
        fails,
        lambda _, logits: logits[0],
        lambda _, logits: logits[:, :-1],
        lambda _, logits: None,
    ]
    errors = [
        "KeyError: 'nothing found'",
        *(
            f"ValueError: a logits processor must return logits of shape (1, {VOCAB}), got {got}"
            for got in (f"({VOCAB},)", f"(1, {VOCAB - 1})", "NoneType")
        ),
    ]
    params = [greedy(logits_processors=[fault]) for fault in faults]
    *failed, good = llm.generate([prompt] * 5, [*params, greedy()])
    expected = reference(prompt, 24)
    assert good.outputs[0].token_ids == expected
    for output, error in zip(failed, errors, strict=True):
        assert (output.outputs[0].finish_reason, output.outputs[0].error) == ("error", error)
    assert [output.outputs[0].token_ids for output in failed] == [expected[:3], [], [], []]
    assert failed[0].text == TOKENIZER.decode(expected[:3]).rstrip("\ufffd")
    assert tokens_of(llm, [prompt], greedy()) == [expected]


class Recorder(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append("end")


def test_streamers_of_transformers(llm: CompiledLLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Tell me: "
    params = greedy(allowed_token_ids=ASCII, stop="\n")
    expected = complete(llm, prompt, params)
    recorder = Recorder()
    (output,) = llm.generate(prompt, params, streamer=recorder)
    assert output.outputs[0].token_ids == expected.token_ids
    assert recorder.given == [[encode(prompt)], *([token] for token in expected.token_ids), "end"]
    pieces = TextIteratorStreamer(TOKENIZER, skip_prompt=True)
    llm.generate(prompt, params, streamer=pieces)
    assert "".join(pieces) == output.text == expected.text
    llm.generate(prompt, params, streamer=TextStreamer(TOKENIZER))
    assert capsys.readouterr().out == prompt + expected.text + "\n"
    for prompts, wanted in (
        ([prompt, prompt], params),
        ([prompt], drawn(n=2)),
        ([prompt], [drawn(n=2)]),
    ):
        with pytest.raises(
            ValueError, match="a streamer takes one completion of one prompt, got 2"
        ):
            llm.generate(prompts, wanted, streamer=recorder)


def test_outputs_say_what_they_cost(llm: CompiledLLM) -> None:
    (output,) = llm.generate("Tell me: ", greedy())
    completion = output.outputs[0]
    assert (output.prompt, output.prompt_token_ids) == ("Tell me: ", encode("Tell me: "))
    assert output.usage == {"prompt_tokens": 9, "completion_tokens": 24, "total_tokens": 33}
    assert (completion.index, completion.finish_reason, completion.error, completion.logprobs) == (
        0,
        "length",
        None,
        None,
    )
    metrics = completion.metrics
    assert metrics is not None
    assert None not in (
        metrics.queue,
        metrics.time_to_first_token,
        metrics.time_per_output_token,
        metrics.total,
    )
    assert 0 <= metrics.queue < metrics.time_to_first_token < metrics.total < 60
    assert metrics.time_per_output_token * 23 == pytest.approx(
        metrics.total - metrics.time_to_first_token
    )
    queues = [
        output.outputs[0].metrics.queue for output in llm.generate([prompt_of(9)] * 5, greedy())
    ]
    assert max(queues) == queues[4]
    single = complete(llm, "Tell me: ", greedy(max_tokens=1)).metrics
    assert single is not None
    assert single.time_per_output_token is None
    assert single.total == single.time_to_first_token
