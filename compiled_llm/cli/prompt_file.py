"""A file of prompts, one JSON line each.

A line is a text, or an object: "prompt" (text or token ids) or "messages"; "id", by default the line's number from 0; and
"params", fields of `SamplingParams` that go over the command line's.
"""

import difflib
import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from compiled_llm.config.messages import excerpt
from compiled_llm.sampling_params import SamplingParams

Id = str | int

_PARAMS = [entry.name for entry in fields(SamplingParams) if entry.name != "logits_processors"]
_KEYS = ("id", "prompt", "messages", "params")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """One line of the prompts: its number from 1, and what it says."""

    number: int
    id: Id
    kind: Literal["prompt", "messages"]
    content: Any
    params: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path, params: SamplingParams) -> dict[Id, PromptLine]:
    """The prompts of a file by their ids; blank lines are left out. `params` are what theirs go over.

    Raises:
        ValueError: the message says which line is at fault, and what was expected.
    """
    lines: dict[Id, PromptLine] = {}
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    _add(lines, path, number, text, params)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not lines:
        raise ValueError(f"{path} holds no prompts: expected one on each line, as JSON")
    return lines


def merge_sampling_params(
    base: SamplingParams, name: Id, changes: dict[str, Any]
) -> SamplingParams:
    """What a line says, over the command line's params.

    Of the command line's seed and the line's id a seed is made: the line draws the same tokens wherever it stands in the file,
    whatever runs beside it, and lines of the same prompt draw different ones.
    """
    for key in changes:
        if key not in _PARAMS:
            near = difflib.get_close_matches(key, _PARAMS, n=1)
            raise ValueError(
                f"params: unknown field {key!r}: "
                + (f"did you mean {near[0]!r}?" if near else ", ".join(_PARAMS))
            )
    bias = changes.get("logit_bias")
    if isinstance(bias, dict):  # JSON has no numbers for keys
        changes = {
            **changes,
            "logit_bias": {
                int(key) if key.isdecimal() else key: value for key, value in bias.items()
            },
        }
    try:
        return replace(base, **{"seed": _seed_of(base.seed, name), **changes})
    except ValueError as error:
        raise ValueError(f"params: {error}") from None


def parse(text: bytes) -> Any:
    """A line's JSON, which can be written again: no half of a surrogate pair is in it. Raises ValueError."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected JSON in UTF-8, got {excerpt(text.strip().decode(errors='replace'))}: {error}"
        ) from None
    return value


def require(fits: bool, name: str, expected: str, got: object) -> None:
    """Raise a ValueError unless it fits."""
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {excerpt(got)}")


def is_id(value: object) -> bool:
    """Whether a line may be called so."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def _add(
    lines: dict[Id, PromptLine], path: Path, number: int, text: bytes, params: SamplingParams
) -> None:
    try:
        line = _parse_prompt(number, text)
        if line.params:
            merge_sampling_params(params, line.id, line.params)
        if line.id in lines:
            raise ValueError(
                f"id {line.id!r} must be unique, and line {lines[line.id].number} has it too"
            )
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from None
    lines[line.id] = line


def _parse_prompt(number: int, text: bytes) -> PromptLine:
    value = parse(text)
    value = {"prompt": value} if isinstance(value, str) else value
    require(
        isinstance(value, dict),
        "the line",
        'a JSON string, or an object with "prompt" or "messages"',
        value,
    )
    for key in value:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}: expected {', '.join(_KEYS)}")
    if ("prompt" in value) == ("messages" in value):
        raise ValueError(
            f'expected exactly one of "prompt" and "messages", got {"both" if "prompt" in value else "neither"}'
        )
    kind: Literal["prompt", "messages"] = "prompt" if "prompt" in value else "messages"
    content, name, params = value[kind], value.get("id", number - 1), value.get("params", {})
    require(is_id(name), "id", "a string or a whole number", name)
    require(isinstance(params, dict), "params", "an object", params)
    fits = _is_prompt(content) if kind == "prompt" else _is_conversation(content)
    expected = (
        "text or a list of token ids"
        if kind == "prompt"
        else "a list of objects with role and content"
    )
    require(fits, kind, f"{expected}, not empty", content)
    return PromptLine(number=number, id=name, kind=kind, content=content, params=params)


def _seed_of(seed: int | None, name: Id) -> int | None:
    """63 bits of a hash of the seed and the id."""
    if seed is None:
        return None
    digest = hashlib.blake2b(json.dumps([seed, name]).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _is_prompt(value: object) -> bool:
    ids = isinstance(value, list) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in value
    )
    return bool(value) and (isinstance(value, str) or ids)


def _is_conversation(value: object) -> bool:
    messages = value if isinstance(value, list) else []
    return bool(messages) and all(
        isinstance(entry, dict) and {"role", "content"} <= entry.keys() for entry in messages
    )
