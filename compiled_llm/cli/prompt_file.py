"""Read a file of prompts, one JSON line each.

A line is a text or an object. An object has "prompt" (text or token ids) or "messages"; optionally
"id", by default the line's number from 0; and optionally "params", fields of `SamplingParams` that
override the command line's.
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
    """One line of a file of prompts.

    Attributes:
        number: of the line, from 1.
        id: identifies the prompt in the file of results.
        kind: the key of the content.
        content: text, token ids or messages.
        params: fields of `SamplingParams`.
    """

    number: int
    id: Id
    kind: Literal["prompt", "messages"]
    content: Any
    params: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path, params: SamplingParams) -> dict[Id, PromptLine]:
    """Return the prompts of a file by their ids, without blank lines.

    Args:
        path: the file.
        params: the parameters that those of lines override; used to check the lines.

    Raises:
        ValueError: the file cannot be read, or a line is not valid.
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
    """Return the parameters of a line: those of the command line, with the line's changes.

    The seed is derived from the command line's and the line's id. A line therefore draws the same
    tokens wherever it stands in the file and whatever runs beside it, and two lines with the same
    prompt draw different ones.

    Raises:
        ValueError: a change has an unknown name or an invalid value.
    """
    for key in changes:
        if key not in _PARAMS:
            near = difflib.get_close_matches(key, _PARAMS, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_PARAMS)}"
            raise ValueError(f"params: unknown field {key!r}: {remedy}")
    bias = changes.get("logit_bias")
    if isinstance(bias, dict):  # keys of JSON objects are strings
        numbers = {int(key) if key.isdecimal() else key: value for key, value in bias.items()}
        changes = {**changes, "logit_bias": numbers}
    try:
        return replace(base, **{"seed": _derive_seed(base.seed, name), **changes})
    except ValueError as error:
        raise ValueError(f"params: {error}") from None


def parse_json_line(text: bytes) -> Any:
    """Return the value of a JSON line.

    Raises:
        ValueError: the line is not JSON in UTF-8, or cannot be written again since it has a lone
            surrogate.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        found = excerpt(text.strip().decode(errors="replace"))
        raise ValueError(f"expected JSON in UTF-8, got {found}: {error}") from None
    return value


def require(is_valid: bool, name: str, expected: str, got: object) -> None:
    """Raise a ValueError unless `is_valid`."""
    if not is_valid:
        raise ValueError(f"{name} must be {expected}, got {excerpt(got)}")


def is_id(value: object) -> bool:
    """Return whether a value is valid as the id of a line."""
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
                f"id {line.id!r} must be unique, but line {lines[line.id].number} has it too"
            )
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from None
    lines[line.id] = line


def _parse_prompt(number: int, text: bytes) -> PromptLine:
    value = parse_json_line(text)
    value = {"prompt": value} if isinstance(value, str) else value
    expected = 'a JSON string, or an object with "prompt" or "messages"'
    require(isinstance(value, dict), "the line", expected, value)
    for key in value:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}: expected {', '.join(_KEYS)}")
    if ("prompt" in value) == ("messages" in value):
        given = "both" if "prompt" in value else "neither"
        raise ValueError(f'expected exactly one of "prompt" and "messages", got {given}')
    kind: Literal["prompt", "messages"] = "prompt" if "prompt" in value else "messages"
    content, name, params = value[kind], value.get("id", number - 1), value.get("params", {})
    require(is_id(name), "id", "a string or a whole number", name)
    require(isinstance(params, dict), "params", "an object", params)
    if kind == "prompt":
        expected = "text or a list of token ids, not empty"
        require(_is_prompt(content), kind, expected, content)
    else:
        expected = "a list of objects with role and content, not empty"
        require(_is_conversation(content), kind, expected, content)
    return PromptLine(number=number, id=name, kind=kind, content=content, params=params)


def _derive_seed(seed: int | None, name: Id) -> int | None:
    """Return 63 bits of a hash of the seed and the id."""
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
