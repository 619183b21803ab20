"""Start, end, threads and queue limits of the Python API."""

import threading
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.errors import QueueFullError
from tests.helpers.eager_engine import eager_llm
from tests.helpers.tiny_models import (
    Reference,
    greedy,
    prompt_of,
    small_config,
    tiny_model,
)


def test_another_thread_is_refused(llm: CompiledLLM) -> None:
    caught: list[Exception] = []

    def call() -> None:
        try:
            llm.generate([5, 6])
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "belongs to the thread that made it" in str(caught[0])


def test_another_thread_does_not_close_what_generates(reference: Reference) -> None:
    """Closing is refused while the owner generates, and allowed afterwards."""
    llm = CompiledLLM(
        tiny_model("llama"), None, small_config(compile={"dispatch": "eager"}), progress=False
    )
    caught: list[str] = []

    def close() -> None:
        try:
            llm.close()
        except RuntimeError as error:
            caught.append(str(error))

    def close_elsewhere() -> None:
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()

    def processor(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        close_elsewhere()
        return logits

    class Streamer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            close_elsewhere()

        def end(self) -> None:
            """Ignore the token."""

    options: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
    for params, streamer, message in (
        (SamplingParams(**options, logits_processors=[processor]), None, "is in a step"),
        (SamplingParams(**options), Streamer(), "is generating in the thread that made it"),
    ):
        caught.clear()
        (output,) = llm.generate([prompt_of(9)], params, streamer=streamer)
        assert output.outputs[0].token_ids == reference(prompt_of(9), 3)
        assert len(caught) >= 3
        assert all(message in text for text in caught)
    close_elsewhere()
    with pytest.raises(RuntimeError, match="is closed"):
        llm.generate([5])


def test_strict_refuses_a_request_whose_steps_would_have_no_bucket(reference: Reference) -> None:
    """The request is refused before anything runs."""
    config = small_config(
        strict=True, buckets={"decode": [], "prefill": [48], "samplers": ["greedy"]}
    )
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as llm:
        with pytest.raises(
            ValueError,
            match=r"no prefill bucket serves the scoring sampler.*add scoring to buckets\.samplers",
        ):
            llm.generate([prompt_of(9)], SamplingParams(temperature=0, prompt_logprobs=1))
        with pytest.raises(ValueError, match="no prefill bucket serves the random sampler"):
            llm.generate([prompt_of(9)], SamplingParams(temperature=0.5))
        assert greedy(llm, [prompt_of(40)], 5) == [reference(prompt_of(40), 5)]
        assert not llm.report().fallbacks


def test_a_length_beyond_the_models_positions_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"limits.max_model_len=300, but the model has only 256 positions: lower it",
    ):
        CompiledLLM(
            tiny_model("llama"), None, small_config(limits={"max_model_len": 300}), progress=False
        )


def test_an_unknown_inductor_option_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"no option 'coordinate_descent_tunning': did you mean 'coordinate_descent_tuning'\?",
    ):
        CompiledLLM(
            tiny_model("llama"),
            None,
            small_config(compile={"options": {"coordinate_descent_tunning": True}}),
            progress=False,
        )


def test_closing_restores_the_model_and_ends_the_engine() -> None:
    model = tiny_model("llama")
    expected = Reference(model)(prompt_of(9), 5)
    engine = CompiledLLM(model, None, small_config(compile={"dispatch": "eager"}), progress=False)
    assert greedy(engine, [prompt_of(9)], 5) == [expected]
    assert engine.report().fallbacks == {"compile.dispatch is eager": 5}
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="this CompiledLLM is closed"):
        engine.generate([5])
    assert model.config._attn_implementation == "sdpa"
    assert Reference(model)(prompt_of(9), 5) == expected


def test_a_request_that_waited_too_long_is_aborted(reference: Reference) -> None:
    limits = {
        "max_num_seqs": 1,
        "max_num_batched_tokens": 48,
        "max_model_len": 128,
        "max_waiting_seconds": 0.05,
    }
    with eager_llm(limits) as engine:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        first, second = engine.generate([prompt_of(9), prompt_of(20)], params)
        assert first.outputs[0].token_ids == reference(prompt_of(9), 100)
        assert (second.outputs[0].finish_reason, second.outputs[0].token_ids) == ("abort", [])
        assert second.outputs[0].error == "it waited longer than limits.max_waiting_seconds=0.05"
        assert greedy(engine, [prompt_of(20)], 5) == [reference(prompt_of(20), 5)]


def test_a_full_queue_refuses_and_generate_feeds_it_as_there_is_room(reference: Reference) -> None:
    limits = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 48,
        "max_model_len": 128,
        "max_waiting": 1,
    }
    with eager_llm(limits) as engine:
        requests = [
            group.requests[0]
            for group in engine._runner.make_groups([prompt_of(9)] * 4, None, None, streaming=False)
        ]
        for request in requests[:3]:
            engine.engine.add_request(request)
        with pytest.raises(QueueFullError, match=r"3 requests are waiting.*limits.max_waiting"):
            engine.engine.add_request(requests[3])
        for request in requests[:3]:
            engine.engine.abort(request)
        prompts = [prompt_of(5 + number) for number in range(7)]
        assert greedy(engine, prompts, 5) == [reference(prompt, 5) for prompt in prompts]
