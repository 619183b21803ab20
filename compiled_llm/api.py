"""The Python API: a compiled model that generates."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compiled_llm.config import Config, ModelConfig, load_config, parse_config
from compiled_llm.engine.engine import Engine
from compiled_llm.engine.request import Request
from compiled_llm.engine.sampling_params import SamplingParams
from compiled_llm.models.discovery import attached, discover
from compiled_llm.models.loading import load, resolve_device
from compiled_llm.outputs import CompletionOutput, RequestOutput
from compiled_llm.runtime.report import Report
from compiled_llm.runtime.runtime import Runtime

Message = dict[str, str]
Prompt = str | Sequence[int]
ConfigLike = Config | str | Path | dict[str, Any] | None


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
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, _resolve_config(config)
        report = _report or Report()
        self._resources = ExitStack()
        try:
            self._resources.enter_context(attached(model))
            with report.phase("examine model", model.device):
                layers = discover(model)
            self._runtime: Runtime | None = Runtime(model, layers, self.config, report, progress=progress)
            self._engine = Engine(self._runtime, vocab_size=_vocab_size(model), eos_token_ids=_eos_token_ids(model, tokenizer))
        except BaseException:
            self._resources.close()
            raise
        report.facts.update(_facts(self._runtime, model))

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, *, config: ConfigLike = None, progress: bool = True) -> Self:
        """Load a model and compile it.

        Args:
            model: a directory, hub id or .gguf file; None is what the config names, or the default, SmolLM2-135M-Instruct.
            config: a `Config`, the path of a YAML file, or a dict of the same keys.
            progress: show progress on standard error.
        """
        resolved = _resolve_config(config)
        if model is not None:
            named = ModelConfig.model_validate({**resolved.model.model_dump(), "name": str(model)})
            resolved = resolved.model_copy(update={"model": named})
        report = Report()
        with report.phase("load weights", resolve_device(resolved.model)):
            loaded = load(resolved.model)
        return cls(loaded.model, loaded.tokenizer, resolved, progress=progress, _report=report)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete prompts: text or token ids, one or many; the outputs come in their order.

        Raises:
            ValueError: a prompt or parameter cannot be served; nothing was run, and the engine goes on.
        """
        listed = _list_prompts(prompts)
        requests = self._requests(listed, params)
        for _ in self._alive().run(requests):
            pass
        return [self._output(prompt, request) for prompt, request in zip(listed, requests, strict=True)]

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the tokenizer's chat template."""
        one = bool(messages) and isinstance(messages[0], dict)
        conversations = cast(Sequence[Sequence[Message]], [messages] if one else messages)
        return self.generate([self._chat_prompt(conversation) for conversation in conversations], params)

    def stream(self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt, or answer one conversation, and yield its text as it comes, never splitting a character.

        Closing the iterator ends the request.
        """
        if not hasattr(self.tokenizer, "backend_tokenizer"):
            raise ValueError("stream() yields text, and this model has no (fast) tokenizer: pass one, or use generate()")
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], dict):
            prompt = self._chat_prompt(cast(Sequence[Message], prompt))
        (request,) = self._requests([cast(Prompt, prompt)], params)
        return self._stream(request)

    @property
    def runtime(self) -> Runtime:
        """What runs the steps, for those who drive them without requests, as the benchmarks do."""
        self._alive()
        assert self._runtime is not None
        return self._runtime

    def report(self) -> Report:
        """Phases, buckets, passes, fallbacks and graph events so far; prints as tables."""
        return self.runtime.report

    def close(self) -> None:
        """Free the caches and graphs, and give the model its own attention back. A second call does nothing."""
        if self._runtime is None:
            return
        del self._engine
        self._runtime = None
        self._resources.close()
        if self.model.device.type == "cuda":
            gc.collect()  # compiled functions and their graphs refer to each other
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _alive(self) -> Engine:
        if self._runtime is None:
            raise RuntimeError("this CompiledLLM is closed: make a new one")
        return self._engine

    def _requests(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None) -> list[Request]:
        """Checked requests, or a ValueError that says which prompt is at fault."""
        engine = self._alive()
        listed = [params or SamplingParams()] * len(prompts) if isinstance(params, SamplingParams | None) else list(params)
        if len(listed) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts were given {len(listed)} sampling params: expected one for all or one for each"
            )
        requests = []
        for number, (prompt, wanted) in enumerate(zip(prompts, listed, strict=True)):
            try:
                request = Request(prompt_token_ids=self._encode(prompt), params=wanted)
                engine.check(request)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
            requests.append(request)
        return requests

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str | Sequence):
            raise ValueError(f"a prompt must be text or a list of token ids, got {type(prompt).__name__}")
        if not isinstance(prompt, str):
            return [_token_id(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give token ids, or pass a tokenizer")
        if not prompt:
            raise ValueError("the prompt is empty: expected at least one character")
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        return ids

    def _chat_prompt(self, conversation: Sequence[Message]) -> list[int]:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError("chat needs a tokenizer with a chat template: use generate() with a prompt of your own making")
        for message in conversation:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(f"a message must be a dict with role and content, got {message!r}")
        templated: Any = self.tokenizer.apply_chat_template(list(conversation), add_generation_prompt=True, return_dict=True)
        ids: list[int] = templated["input_ids"]
        return ids

    def _stream(self, request: Request) -> Iterator[str]:
        assert self.tokenizer is not None
        decoder = DecodeStream(skip_special_tokens=True)
        for _ in self._alive().run([request]):
            text = decoder.step(self.tokenizer.backend_tokenizer, request.token_ids[-1])
            if text is not None:
                yield text

    def _output(self, prompt: Prompt, request: Request) -> RequestOutput:
        text = "" if self.tokenizer is None else str(self.tokenizer.decode(request.token_ids, skip_special_tokens=True))
        completion = CompletionOutput(index=0, text=text, token_ids=request.token_ids, finish_reason=request.finish_reason)
        return RequestOutput(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[completion],
        )


def _resolve_config(config: ConfigLike) -> Config:
    if isinstance(config, Config):
        return config
    return parse_config(config) if isinstance(config, dict) else load_config(config)


def _list_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many -> many."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _token_id(token: object) -> int:
    if not isinstance(token, int) or isinstance(token, bool):
        raise ValueError(f"token ids must be whole numbers, got {token!r}")
    return token


def _vocab_size(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(token for token in [*listed, getattr(tokenizer, "eos_token_id", None)] if token is not None)


def _facts(runtime: Runtime, model: PreTrainedModel) -> dict[str, str | int]:
    memory, limits = runtime.memory, runtime.limits
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    return {
        "model": f"{type(model).__name__}, {model.num_parameters() / 1e6:.0f} M parameters, {model.dtype}, on {name}",
        "KV cache": f"{memory.num_pages} pages of {memory.block_size} tokens",
        "limits": f"{limits.max_num_seqs} sequences, {limits.max_num_batched_tokens} tokens a step, {limits.max_model_len} each",
    }
