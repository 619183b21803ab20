"""The Python API: a compiled model that generates."""

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from compiled_llm.config.loader import parse_config
from compiled_llm.engine.engine import CHANGING, Engine
from compiled_llm.engine.processor import RequestGroup, RequestProcessor, raise_failure
from compiled_llm.engine.prompts import (
    Message,
    Prompt,
    list_conversations,
    list_for_each,
    list_prompts,
)
from compiled_llm.engine.recovery import count_on_stack
from compiled_llm.engine.request import Request
from compiled_llm.models.loading import load, resolve_device
from compiled_llm.models.vocabulary import num_embeddings, vocab_size
from compiled_llm.outputs import RequestOutput
from compiled_llm.progress import feeder, progress_bar
from compiled_llm.report.report import Report
from compiled_llm.running import run
from compiled_llm.runtime.compilation.worker_pool import CompilePool, start_pool_early
from compiled_llm.runtime.model_runner import ModelRunner
from compiled_llm.sampling_params import SamplingParams
from compiled_llm.startup import (
    ConfigLike,
    new_report,
    resolve_config,
    start,
)
from compiled_llm.system.compiler_lock import try_compiler_lock


class LoadOptions(TypedDict, total=False):
    """What `from_pretrained` takes besides the model; see `CompiledLLM.from_pretrained`."""

    config: ConfigLike
    artifact: str | Path | None
    progress: bool


class CompiledLLM:
    """A Hugging Face causal LM, compiled and ready to generate.

    Args:
        model: a transformers model, which stays as it is; its attention is routed here until `close()`.
        tokenizer: its tokenizer; without one, prompts are token ids and outputs have no text.
        config: a `Config`, the path of a YAML file, or a dict of the same keys; its `model` section is not read.
        progress: show the start's progress on standard error.

    Raises:
        UnsupportedModelError: a ValueError that names the feature of the model which is not served.
        ValueError: the config does not fit the model or the machine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: ConfigLike = None,
        *,
        progress: bool = True,
        _report: Report | None = None,
        _pool: CompilePool | None = None,
        _just_loaded: bool = False,
        _tokenizer_failure: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, resolve_config(config)
        with ExitStack() as resources:
            report = _report or new_report()
            self._model_runner: ModelRunner | None = start(
                model,
                self.config,
                report,
                resources,
                progress=progress,
                pool=_pool,
                just_loaded=_just_loaded,
            )
            max_model_len = self._model_runner.limits.max_model_len
            self._jobs = RequestProcessor(
                tokenizer,
                model.generation_config,
                max_model_len=max_model_len,
                tokenizer_failure=_tokenizer_failure,
            )
            self._engine = Engine(
                self._model_runner,
                vocab_size=vocab_size(model),
                num_embeddings=num_embeddings(model),
                decode_token=self._jobs.decode_token,
            )
            # Also where nobody closes it: the model is the user's again when this object is collected.
            self._give_back = weakref.finalize(self, resources.pop_all().close)
            self._give_back.atexit = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        config: ConfigLike = None,
        artifact: str | Path | None = None,
        progress: bool = True,
    ) -> Self:
        """Load a model and compile it, or take what was compiled before.

        Args:
            model: a directory, hub id or .gguf file; None is what the config names, or the default, SmolLM2-135M-Instruct.
            config: a `Config`, the path of a YAML file, or a dict of the same keys.
            artifact: the directory that keeps what was compiled, as `compile.artifact` in a config; what it has and fits is not
                compiled again, and where it is empty, it is filled.
            progress: show progress on standard error.
        """
        resolved = resolve_config(config)
        if artifact is not None:
            kept = resolved.compile.model_copy(update={"artifact": Path(artifact)})
            resolved = resolved.model_copy(update={"compile": kept})
        if model is not None:
            named = {**resolved.model.model_dump(), "name": str(model)}
            resolved = resolved.model_copy(update={"model": parse_config({"model": named}).model})
        report, device = new_report(), resolve_device(resolved.model)
        with start_pool_early(resolved, device) or nullcontext() as pool:
            with report.phase("load weights", device):
                loaded = load(resolved.model)
            failure = loaded.tokenizer_failure
            if failure is not None:
                report.warn(
                    f"the tokenizer cannot be loaded, so prompts must be token ids: {failure}"
                )
            return cls(
                loaded.model,
                loaded.tokenizer,
                resolved,
                progress=progress,
                _report=report,
                _pool=pool,
                _just_loaded=True,
                _tokenizer_failure=failure,
            )

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What requests without params get: what the checkpoint's generation config sets, over the defaults."""
        return self._jobs.default_params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool = True,
        streamer: BaseStreamer | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts: text or token ids, one or many; the outputs come in their order.

        Args:
            prompts: one or many.
            params: one for all or one for each; by default the checkpoint's.
            priority: for each prompt; lower numbers go first.
            progress: show a progress bar, where standard error is a terminal.
            streamer: a transformers streamer that gets the tokens of a single prompt as they come.

        Raises:
            ValueError: a prompt or parameter cannot be served; nothing was run, and the engine goes on.
        """
        listed = list_prompts(prompts)
        jobs = self._make_jobs(listed, params, priority, streaming=streamer is not None)
        total = sum(len(job.requests) for job in jobs)
        if streamer is not None and total != 1:
            raise ValueError(
                f"a streamer takes one completion of one prompt, got {total}: use stream(), or drop it"
            )
        feed = feeder(streamer)
        # By arrival, a queue that is always long enough is as good as all of them.
        at_once = 2 * self.model_runner.limits.max_num_seqs if priority is None else None
        with (
            progress_bar(total, enabled=progress and streamer is None) as show,
            closing(run(self._alive(), jobs, at_once=at_once)) as requests,
        ):
            for request in requests:
                feed(request)
                show(request)
        return [self._jobs.output(job) for job in jobs]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the tokenizer's chat template; options as in `generate`."""
        return self.generate(
            cast(Sequence[Prompt], list_conversations(messages)), params, **options
        )

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Complete one prompt, or answer one conversation, and yield its text as it comes, never splitting a character.

        Several streams may be open at once: each step serves them all. Closing the iterator ends the request.
        """
        self._jobs.check_stream(params)
        (job,) = self._make_jobs([cast(Prompt, prompt)], params, None, streaming=True)
        return self._stream(job)

    def as_completed(
        self, prompts: Iterable[tuple[Prompt | Sequence[Message], SamplingParams | None]]
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Complete prompts or conversations, and yield each one's number, from 0, and output as soon as it has ended.

        The iterable is read as there is room, about as many prompts ahead as run at once, so it may be of any length. An error
        in it, or closing the iterator, ends what runs.

        Args:
            prompts: each with its sampling params, or None for the checkpoint's.

        Raises:
            ValueError: a prompt cannot be served; see `check`.
        """
        unfinished: dict[Request, tuple[int, RequestGroup]] = {}

        def jobs() -> Iterator[RequestGroup]:
            for number, (prompt, params) in enumerate(prompts):
                job = self._make_job(prompt, params)
                unfinished.update(dict.fromkeys(job.requests, (number, job)))
                yield job

        with closing(
            run(self._alive(), jobs(), at_once=2 * self.model_runner.limits.max_num_seqs)
        ) as requests:
            for request in requests:
                if request.finish_reason is not None:
                    number, job = unfinished.pop(request)
                    if unfinished.keys().isdisjoint(job.requests):
                        yield number, self._jobs.output(job)

    def check(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> None:
        """Raise the ValueError that generating from this prompt would raise; nothing is run."""
        self._make_job(prompt, params)

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefix blocks."""
        self._alive().reset_prefix_cache()

    @property
    def model_runner(self) -> ModelRunner:
        """What runs the steps."""
        self._alive()
        assert self._model_runner is not None
        return self._model_runner

    @property
    def engine(self) -> Engine:
        """What runs the requests, for those who step it themselves."""
        return self._alive()

    @property
    def jobs(self) -> RequestProcessor:
        """What makes the engine's requests, and their outputs."""
        return self._jobs

    def report(self) -> Report:
        """Phases, buckets, passes, fallbacks and graph events so far; prints as tables."""
        return self.model_runner.report

    def close(self) -> None:
        """Free the caches and graphs, and give the model its own attention back. A second call does nothing.

        Raises:
            RuntimeError: the engine is in use, in a logits processor or by another thread.
        """
        if self._model_runner is None:
            return
        self._check_idle(self._model_runner)
        del self._engine
        self._model_runner.save_traffic()
        self._model_runner = None
        self._give_back()
        if self.model.device.type == "cuda":
            gc.collect()  # compiled functions and their graphs refer to each other
            with try_compiler_lock() as free:
                if free:  # it raises during another engine's capture
                    torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _alive(self) -> Engine:
        if self._model_runner is None:
            raise RuntimeError("this CompiledLLM is closed: make a new one")
        return self._engine

    def _check_idle(self, model_runner: ModelRunner) -> None:
        """Raise a RuntimeError if this is in use on the stack of the thread that owns it."""
        frame = (
            sys._getframe()
            if model_runner.is_owner
            else sys._current_frames().get(model_runner.owner_thread)
        )
        if count_on_stack(self._engine, CHANGING, frame):
            raise RuntimeError("this CompiledLLM is in a step: close it when that has ended")
        if not model_runner.is_owner and count_on_stack(self, _GENERATING, frame):
            raise RuntimeError(
                "this CompiledLLM is generating in the thread that made it: close it there, or afterwards"
            )

    def _make_jobs(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        *,
        streaming: bool,
    ) -> list[RequestGroup]:
        """Checked jobs, or a ValueError that says which prompt is at fault."""
        count = len(prompts)
        listed = (
            [params] * count
            if isinstance(params, SamplingParams | None)
            else list_for_each(params, count, "sampling params")
        )
        priorities = (
            [0] * count if priority is None else list_for_each(priority, count, "priorities")
        )
        jobs = []
        for number, (prompt, wanted, urgency) in enumerate(
            zip(prompts, listed, priorities, strict=True)
        ):
            try:
                jobs.append(self._make_job(prompt, wanted, priority=urgency, streaming=streaming))
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
        return jobs

    def _make_job(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None,
        *,
        priority: int = 0,
        streaming: bool = False,
    ) -> RequestGroup:
        engine = self._alive()
        job = self._jobs.make(prompt, params, priority=priority, streaming=streaming)
        engine.check(job.requests[0])
        return job

    def _stream(self, job: RequestGroup) -> Iterator[str]:
        (request,) = job.requests
        assert request.detokenizer is not None
        with closing(run(self._alive(), [job])) as steps:
            for _ in steps:
                text = request.detokenizer.take(final=request.finish_reason is not None)
                if text:
                    yield text
        raise_failure(request)


_GENERATING = {
    method.__code__
    for method in (CompiledLLM.generate, CompiledLLM.as_completed, CompiledLLM._stream)
}
