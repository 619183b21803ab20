"""What generation returns; the shape is vLLM's."""

from dataclasses import dataclass

from compiled_llm.engine.request import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion. `text` is empty when the model has no tokenizer."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its completions; `prompt` is None when it was given as token ids."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.outputs[0].text
