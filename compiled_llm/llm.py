"""Synchronous Python API: a compiled model that generates text."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Self, TypedDict, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from compiled_llm.config.loader import parse_config
from compiled_llm.config.schema import Config
from compiled_llm.engine.engine import Engine
from compiled_llm.engine.prompts import Message, Prompt, list_conversations, list_prompts
from compiled_llm.models.loading import LoadedModel, load, resolve_device
from compiled_llm.outputs import RequestOutput
from compiled_llm.progress import progress_bar, streamer_callback
from compiled_llm.report.report import Report
from compiled_llm.runtime.compilation.worker_pool import start_pool_early
from compiled_llm.runtime.model_runner import ModelRunner
from compiled_llm.sampling_params import SamplingParams
from compiled_llm.session import Session
from compiled_llm.startup import ConfigLike, new_report, resolve_config


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `CompiledLLM.from_pretrained`."""

    config: ConfigLike
    artifact: str | Path | None
    progress: bool


class CompiledLLM:
    """A Hugging Face causal LM, compiled and ready to generate.

    Args:
        model: a transformers model. It is not modified; until `close()`, its attention is routed to
            the paged KV cache.
        tokenizer: the model's tokenizer; without one, prompts are token ids and outputs have no
            text.
        config: a `Config`, the path of a YAML file, or a dict of the same keys; its `model` section
            is not read.
        progress: show the progress of the start on standard error.

    Raises:
        UnsupportedModelError: a ValueError that names the unsupported feature of the model.
        ValueError: the config does not fit the model or the machine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: ConfigLike = None,
        *,
        progress: bool = True,
    ) -> None:
        loaded = LoadedModel(model=model, tokenizer=tokenizer)
        self._open(Session(loaded, resolve_config(config), new_report(), progress=progress))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        config: ConfigLike = None,
        artifact: str | Path | None = None,
        progress: bool = True,
    ) -> Self:
        """Load a model and compile it, or load what was compiled before.

        Args:
            model: a directory, hub id or .gguf file; None for the config's model, or else the
                default, SmolLM2-135M-Instruct.
            config: a `Config`, the path of a YAML file, or a dict of the same keys.
            artifact: directory of saved compilations, as `compile.artifact` in a config. What it
                holds and fits is not compiled again; what it lacks is added.
            progress: show progress on standard error.
        """
        resolved = _with_overrides(resolve_config(config), model, artifact)
        report, device = new_report(), resolve_device(resolved.model)
        with start_pool_early(resolved, device) or nullcontext() as pool:
            with report.phase("load weights", device):
                loaded = load(resolved.model)
            if loaded.tokenizer_failure is not None:
                report.warn(
                    "the tokenizer cannot be loaded, so prompts must be token ids: "
                    f"{loaded.tokenizer_failure}"
                )
            llm = cls.__new__(cls)
            llm._open(
                Session(loaded, resolved, report, progress=progress, pool=pool, just_loaded=True)
            )
            return llm

    @property
    def default_sampling_params(self) -> SamplingParams:
        """Sampling parameters of requests without any, from the checkpoint's generation config."""
        return self._runner.processor.default_sampling_params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool = True,
        streamer: BaseStreamer | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, and return the outputs in their order.

        Args:
            prompts: one or many, each a text or token ids.
            sampling_params: one for all or one for each; `default_sampling_params` if None.
            priority: one for each prompt; lower numbers are scheduled first.
            progress: show a progress bar, if standard error is a terminal.
            streamer: a transformers streamer that gets the tokens of a single prompt as they come.

        Raises:
            ValueError: a prompt or parameter is not valid; nothing was run.
        """
        streaming = streamer is not None
        groups = self._runner.make_groups(
            list_prompts(prompts), sampling_params, priority, streaming=streaming
        )
        total = sum(len(group.requests) for group in groups)
        if streaming and total != 1:
            raise ValueError(
                f"a streamer takes one completion of one prompt, got {total}: "
                "use stream(), or drop it"
            )
        with progress_bar(total, enabled=progress and not streaming) as update_bar:
            update = update_bar if streamer is None else streamer_callback(streamer)
            return self._runner.run(groups, update, ordered=priority is not None)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool = True,
        streamer: BaseStreamer | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, formatted by the tokenizer's chat template.

        The arguments other than `messages` are those of `generate`.

        Args:
            messages: a list of messages, or a list of such lists.
        """
        conversations = cast(Sequence[Prompt], list_conversations(messages))
        return self.generate(
            conversations, sampling_params, priority=priority, progress=progress, streamer=streamer
        )

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Complete one prompt or conversation, and yield its text in pieces.

        No piece ends within a character. Several streams may be open at once: each step serves all
        of them. Closing the iterator aborts the request.
        """
        self._runner.processor.check_stream(sampling_params)
        (group,) = self._runner.make_groups([cast(Prompt, prompt)], sampling_params, streaming=True)
        return self._runner.stream(group)

    def as_completed(
        self, prompts: Iterable[tuple[Prompt | Sequence[Message], SamplingParams | None]]
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Complete prompts or conversations, and yield each when it has ended.

        The iterable may have any length; about as many prompts are read ahead as run at once.
        Closing the iterator, or an error of the iterable, aborts the running requests.

        Args:
            prompts: prompts with their sampling parameters, or None for the default.

        Yields:
            The prompt's number, from 0, and its output.

        Raises:
            ValueError: a prompt is not valid; see `check`.
        """
        return self._runner.as_completed(prompts)

    def check(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> None:
        """Raise the ValueError that generating from this prompt would raise; run nothing."""
        self._runner.make_group(prompt, sampling_params)

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefix blocks."""
        self.engine.reset_prefix_cache()

    @property
    def model_runner(self) -> ModelRunner:
        """The model runner, which runs the steps."""
        return self._session.model_runner

    @property
    def engine(self) -> Engine:
        """The engine, for callers that step it themselves."""
        return self._runner.engine

    def report(self) -> Report:
        """Return phases, buckets, passes, fallbacks and graph events; it prints as tables."""
        return self.model_runner.report

    def close(self) -> None:
        """Free the caches and graphs, and restore the model's attention. Idempotent.

        Raises:
            RuntimeError: the engine is in use, by a logits processor or in another thread.
        """
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, session: Session) -> None:
        self.model = session.loaded.model
        self.tokenizer = session.loaded.tokenizer
        self.config = session.config
        self._session = session
        self._runner = session.runner


def _with_overrides(
    config: Config, model: str | Path | None, artifact: str | Path | None
) -> Config:
    """Return the config with the arguments of `from_pretrained` that are not None."""
    if artifact is not None:
        compiling = config.compile.model_copy(update={"artifact": Path(artifact)})
        config = config.model_copy(update={"compile": compiling})
    if model is not None:
        named = {**config.model.model_dump(), "name": str(model)}
        config = config.model_copy(update={"model": parse_config({"model": named}).model})
    return config
