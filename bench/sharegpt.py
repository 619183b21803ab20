"""Length mixes from conversations, as in ShareGPT's files: a list of `{"conversations": [{"from": ..., "value": ...}, ...]}`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ASKS, _ANSWERS = {"human", "user"}, {"gpt", "assistant", "chatgpt", "bard"}


def read_lengths(
    path: Path, count_tokens: Callable[[str], int], *, limit: int, longest: int
) -> list[tuple[int, int]]:
    """Tokens of the first question and the first answer of each conversation, in the file's order.

    Args:
        count_tokens: of a text.
        limit: conversations to take at most.
        longest: tokens of a question and its answer together; longer ones are passed over, and those without either.

    Raises:
        ValueError: the file is not what it should be, or nothing in it can be used.
    """
    lengths: list[tuple[int, int]] = []
    for question, answer in _turns(path):
        pair = count_tokens(question), count_tokens(answer)
        if min(pair) > 0 and sum(pair) <= longest:
            lengths.append(pair)
        if len(lengths) == limit:
            break
    if not lengths:
        raise ValueError(
            f"{path} has no conversation with a question and an answer of at most {longest} tokens together"
        )
    return lengths


def token_counter(model: str | None) -> tuple[Callable[[str], int], str]:
    """Counts tokens with the tokenizer of a config's `model.name`, or words where it has none; and which of the two, in words."""
    from transformers import AutoTokenizer

    from compiled_llm.models.default_model import default_model

    path = Path(default_model() if model is None else model)
    place, file = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    if path.suffix != ".json":
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **file)
        except (OSError, ValueError):
            pass
        else:
            return lambda text: len(tokenizer(text).input_ids), "tokens of the model's tokenizer"
    return lambda text: len(text.split()), "words, since the model has no tokenizer"


def _turns(path: Path) -> list[tuple[str, str]]:
    try:
        entries: Any = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of conversations, got {type(entries).__name__}")
    found = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise ValueError(
                f'{path}: entry {number} is not an object with a list of "conversations"'
            )
        found.append(
            (_first(entry["conversations"], _ASKS), _first(entry["conversations"], _ANSWERS))
        )
    return found


def _first(turns: list[Any], speakers: set[str]) -> str:
    return next(
        (
            str(turn.get("value", ""))
            for turn in turns
            if isinstance(turn, dict) and turn.get("from") in speakers
        ),
        "",
    )
