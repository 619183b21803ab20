"""Runs prompts on an engine in the caller's thread, for the synchronous API."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import cast

from compiled_llm.engine.engine import Engine
from compiled_llm.engine.model_runner_protocol import ModelRunnerProtocol
from compiled_llm.engine.output_builder import OutputBuilder, RequestGroup, raise_failure
from compiled_llm.engine.processor import RequestProcessor, expand_arguments
from compiled_llm.engine.prompts import Message, Prompt
from compiled_llm.engine.recovery import count_on_stack
from compiled_llm.engine.request import Request
from compiled_llm.engine.run import run_to_completion
from compiled_llm.outputs import RequestOutput
from compiled_llm.sampling_params import SamplingParams


class RequestRunner:
    """Makes requests, runs them to completion, and builds their outputs.

    Args:
        engine: the engine.
        processor: makes requests.
        outputs: builds outputs.
        max_requests: requests of one call in the engine at a time, where their order does not
            matter.

    Attributes:
        processor, outputs: the arguments.
    """

    def __init__(
        self,
        engine: Engine,
        processor: RequestProcessor,
        outputs: OutputBuilder,
        *,
        max_requests: int,
    ) -> None:
        self._engine: Engine | None = engine
        self.processor = processor
        self.outputs = outputs
        self._max_requests = max_requests

    @property
    def engine(self) -> Engine:
        """The engine; raises RuntimeError after `close`."""
        if self._engine is None:
            raise closed_error()
        return self._engine

    def close(self) -> None:
        """Drop the engine."""
        self._engine = None

    def check_idle(self, model_runner: ModelRunnerProtocol) -> None:
        """Raise RuntimeError if the thread that owns the model runner is in a call of the engine.

        The owner itself may close the engine between two steps of a generation.
        """
        is_owner = model_runner.is_owner
        frame = (
            sys._getframe() if is_owner else sys._current_frames().get(model_runner.owner_thread)
        )
        if self._engine is not None and self._engine.is_called_in(frame):
            raise RuntimeError("this CompiledLLM is in a step: close it when that has ended")
        if not is_owner and count_on_stack(self, _GENERATING, frame):
            raise RuntimeError(
                "this CompiledLLM is generating in the thread that made it: "
                "close it there, or afterwards"
            )

    def make_groups(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None = None,
        *,
        streaming: bool = False,
    ) -> list[RequestGroup]:
        """Return validated requests for each prompt.

        Raises:
            ValueError: a prompt or parameter is not valid; the message names the prompt's number.
        """
        params, priorities = expand_arguments(len(prompts), sampling_params, priority)
        groups = []
        for number, prompt in enumerate(prompts):
            try:
                group = self.make_group(
                    prompt, params[number], priority=priorities[number], streaming=streaming
                )
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
            groups.append(group)
        return groups

    def make_group(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None,
        *,
        priority: int = 0,
        streaming: bool = False,
        request_id: str | None = None,
    ) -> RequestGroup:
        """Return validated requests for one prompt; see `RequestProcessor.process`."""
        engine = self.engine
        group = self.processor.process(
            prompt, sampling_params, priority=priority, streaming=streaming, request_id=request_id
        )
        engine.validate(group.requests[0])
        return group

    def run(
        self,
        groups: Sequence[RequestGroup],
        callback: Callable[[Request], None],
        *,
        ordered: bool,
    ) -> list[RequestOutput]:
        """Run requests to completion, and return their outputs in order.

        Args:
            groups: validated requests.
            callback: called with each updated request.
            ordered: whether all requests must be in the queue at once, to be ordered by priority.
        """
        # Without priorities, a queue that never becomes empty has the same effect.
        limit = None if ordered else self._max_requests
        running = run_to_completion(self.engine, groups, max_requests=limit)
        with closing(running) as requests:
            for request in requests:
                callback(request)
        return [self.outputs.build(group) for group in groups]

    def stream(self, group: RequestGroup) -> Iterator[str]:
        """Run one request, and yield its text in pieces of complete characters."""
        (request,) = group.requests
        detokenizer = request.detokenizer
        assert detokenizer is not None
        with closing(run_to_completion(self.engine, [group])) as updates:
            for _ in updates:
                text = detokenizer.take(final=request.finish_reason is not None)
                if text:
                    yield text
        raise_failure(request)

    def as_completed(
        self, prompts: Iterable[tuple[Prompt | Sequence[Message], SamplingParams | None]]
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Run prompts, and yield each one's number and output when it has ended."""
        unfinished: dict[Request, tuple[int, RequestGroup]] = {}

        def groups() -> Iterator[RequestGroup]:
            for number, (prompt, sampling_params) in enumerate(prompts):
                group = self.make_group(cast(Prompt, prompt), sampling_params)
                unfinished.update(dict.fromkeys(group.requests, (number, group)))
                yield group

        running = run_to_completion(self.engine, groups(), max_requests=self._max_requests)
        with closing(running) as requests:
            for request in requests:
                if request.finish_reason is not None:
                    number, group = unfinished.pop(request)
                    if unfinished.keys().isdisjoint(group.requests):
                        yield number, self.outputs.build(group)


def closed_error() -> RuntimeError:
    """Return the error of a call after `close`."""
    return RuntimeError("this CompiledLLM is closed: make a new one")


# Code of the methods during which another thread must not close the engine.
_GENERATING = {
    method.__code__
    for method in (
        RequestRunner.make_groups,
        RequestRunner.run,
        RequestRunner.stream,
        RequestRunner.as_completed,
    )
}
