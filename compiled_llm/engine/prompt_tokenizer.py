"""Tokenization of prompts, conversations and banned words."""

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from compiled_llm.engine.prompts import (
    Message,
    Prompt,
    check_message,
    is_conversation,
    token_ids_of,
)

# A text with more characters for each token that fits is examined before it is tokenized.
_CHARACTERS_PER_TOKEN = 16


class PromptTokenizer:
    """Converts what a user gives to token ids.

    Args:
        tokenizer: the model's tokenizer, if it has one.
        max_model_len: tokens of a prompt and its completion at most.
        failure: why the model's tokenizer could not be loaded, for error messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_model_len: int,
        failure: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._missing = "this model has no tokenizer"
        if failure is not None:
            self._missing += f" ({failure})"

    def require(self, purpose: str, remedy: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Args:
            purpose: subject and verb of the error message, such as "chat needs".
            remedy: what to do other than to pass a tokenizer.

        Raises:
            ValueError: there is none.
        """
        if self._tokenizer is None:
            raise ValueError(f"{purpose} a tokenizer, and {self._missing}: pass one, or {remedy}")
        return self._tokenizer

    def encode(self, prompt: Prompt | Sequence[Message]) -> list[int]:
        """Return the token ids of a text, a conversation, or token ids.

        Raises:
            ValueError: the prompt is empty, far too long, or refused by the tokenizer or template.
        """
        if is_conversation(prompt):
            return self._encode_chat(cast(Sequence[Message], prompt))
        if not isinstance(prompt, str):
            return token_ids_of(prompt)
        tokenizer = self.require("a text prompt needs", "give token ids")
        if not prompt:
            raise ValueError("the prompt is empty: expected at least one character")
        self._check_length(tokenizer, prompt)
        try:
            ids: list[int] = tokenizer(prompt)["input_ids"]
        except Exception as error:  # such as for half of a surrogate pair
            raise ValueError(
                f"the tokenizer refuses the prompt: {type(error).__name__}: {error}"
            ) from error
        return ids

    def encode_bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return each word's token ids at the beginning of a text, and after a space."""
        if not words:
            return []
        tokenizer = self.require("bad_words need", "use logit_bias")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip()):
                found[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
        return [list(word) for word in found if word]

    def _check_length(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        """Refuse a text that is far too long, without tokenizing all of it, which takes minutes.

        The tokens of a prefix are those of the text, except for the last few, so the text is
        refused if a prefix has many more tokens than fit. The number of characters alone does not
        decide, because a tokenizer may drop or merge any number of them.
        """
        size, limit = _CHARACTERS_PER_TOKEN * self._max_model_len, 2 * self._max_model_len
        while size < len(text):
            count = len(tokenizer(text[:size])["input_ids"])
            if count > limit:
                raise ValueError(
                    f"the prompt has {len(text)} characters, and its first {size} are {count} "
                    f"tokens already; limits.max_model_len={self._max_model_len} leaves no room "
                    "for output: shorten it or raise the limit"
                )
            size *= 4

    def _encode_chat(self, conversation: Sequence[Message]) -> list[int]:
        tokenizer = self.require("chat needs", "use generate() with token ids")
        if not tokenizer.chat_template:
            raise ValueError(
                "chat needs a tokenizer with a chat template, and this one has none: "
                "use generate() with a complete prompt"
            )
        for message in conversation:
            check_message(message)
        num_characters = sum(len(str(message["content"])) for message in conversation)
        if num_characters > _CHARACTERS_PER_TOKEN * self._max_model_len:
            text = str(_apply_template(tokenizer, conversation, tokenize=False))
            self._check_length(tokenizer, text)
        ids: list[int] = _apply_template(tokenizer, conversation, return_dict=True)["input_ids"]
        return ids


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Message], **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template(
            list(conversation), add_generation_prompt=True, **options
        )
    except Exception as error:  # such as for two successive messages of one role
        raise ValueError(f"the chat template refuses the messages: {error}") from error
