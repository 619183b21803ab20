"""Lengths of prompts and outputs from conversations, in files like ShareGPT's.

Such a file holds a list of `{"conversations": [{"from": ..., "value": ...}, ...]}`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_USERS = {"human", "user"}
_ASSISTANTS = {"gpt", "assistant", "chatgpt", "bard"}


def read_lengths(
    path: Path, count_tokens: Callable[[str], int], *, limit: int, max_length: int
) -> list[tuple[int, int]]:
    """Return the lengths of the first question and answer of each conversation, in file order.

    Conversations without a question or an answer, and longer ones, are skipped.

    Args:
        path: a file like ShareGPT's.
        count_tokens: returns the number of tokens of a text.
        limit: maximum number of conversations.
        max_length: maximum number of tokens of a question and its answer together.

    Raises:
        ValueError: the file has another format, or no conversation is usable.
    """
    lengths: list[tuple[int, int]] = []
    for question, answer in _turns(path):
        pair = count_tokens(question), count_tokens(answer)
        if min(pair) > 0 and sum(pair) <= max_length:
            lengths.append(pair)
        if len(lengths) == limit:
            break
    if not lengths:
        raise ValueError(
            f"{path}: expected a conversation with a question and an answer of at most "
            f"{max_length} tokens together, found none: use another file or raise "
            "limits.max_model_len"
        )
    return lengths


def token_counter(model: str | None) -> tuple[Callable[[str], int], str]:
    """Return a function that counts tokens, and the unit that it counts, in words.

    Args:
        model: `model.name` of a config. A model without a tokenizer counts words instead.
    """
    from transformers import AutoTokenizer

    from compiled_llm.models.default_model import default_model

    path = Path(default_model() if model is None else model)
    directory, options = path, {}
    if path.suffix == ".gguf":
        directory, options = path.parent, {"gguf_file": path.name}
    if path.suffix != ".json":
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        except (OSError, ValueError):
            pass
        else:
            return lambda text: len(tokenizer(text).input_ids), "tokens of the model's tokenizer"
    return lambda text: len(text.split()), "words, because the model has no tokenizer"


def _turns(path: Path) -> list[tuple[str, str]]:
    """Return the first question and answer of each conversation; an absent one is empty."""
    turns = []
    for number, entry in enumerate(_entries(path)):
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise ValueError(
                f'{path}: entry {number}: expected an object with a list "conversations", '
                f"got {json.dumps(entry)[:80]}"
            )
        conversation = entry["conversations"]
        turns.append((_first(conversation, _USERS), _first(conversation, _ASSISTANTS)))
    return turns


def _entries(path: Path) -> list[Any]:
    try:
        entries: Any = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of conversations, got {type(entries).__name__}")
    return entries


def _first(turns: list[Any], speakers: set[str]) -> str:
    for turn in turns:
        if isinstance(turn, dict) and turn.get("from") in speakers:
            return str(turn.get("value", ""))
    return ""
