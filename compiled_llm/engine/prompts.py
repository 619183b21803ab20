"""Forms in which prompts and conversations are given, and the validation of these forms."""

from collections.abc import Sequence
from typing import Any, cast

from compiled_llm.config.messages import excerpt

Message = dict[str, str]
Prompt = str | Sequence[int]

_BYTES = bytes | bytearray | memoryview


def list_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt or many as a list; the prompts themselves are not validated."""
    if isinstance(prompts, str | _BYTES) or _is_array(prompts):
        return [cast(Prompt, prompts)]
    _require_list(prompts, "prompts must be text, token ids, or a list of these")
    if prompts and _is_whole(prompts[0]):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def list_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[Sequence[Message]]:
    """Return one conversation or many as a list.

    Raises:
        ValueError: one of them is not a list that begins with a message.
    """
    expected = "chat() takes a list of messages, or a list of such lists"
    _require_list(messages, expected)
    single = messages and isinstance(messages[0], dict)
    listed = cast(list[Sequence[Message]], [messages] if single else list(messages))
    for number, conversation in enumerate(listed):
        if not is_conversation(conversation):
            raise ValueError(
                f"{expected}, got {excerpt(conversation)} as conversation {number}: "
                "use generate() for other prompts"
            )
    return listed


def list_for_each(given: Any, count: int, name: str) -> list[Any]:
    """Return a list that has one item for each of `count` prompts.

    Args:
        given: the argument.
        count: number of prompts.
        name: name of the argument, for error messages.

    Raises:
        ValueError: it is not a list, or has another length.
    """
    _require_list(given, f"{name} must be a list with one for each prompt")
    if len(given) != count:
        raise ValueError(
            f"{count} prompts were given {len(given)} {name}: expected one for all or one for each"
        )
    return list(given)


def is_conversation(prompt: object) -> bool:
    """Return whether this is a list that begins with a message."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | _BYTES):
        return False
    return bool(prompt) and isinstance(prompt[0], dict)


def check_message(message: object) -> None:
    """Raise ValueError unless this is a dict of a role and of text, a list of parts, or None."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"a message must be a dict with role and content, got {excerpt(message)}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not isinstance(content, str | list | None):
        raise ValueError(
            "a message's role must be text, and its content text or a list of parts, "
            f"got {excerpt(message)}"
        )


def token_ids_of(prompt: object) -> list[int]:
    """Return token ids as a list.

    Args:
        prompt: a sequence, or an array or tensor of one dimension.

    Raises:
        ValueError: it is something else.
    """
    ids: Any = prompt
    if _is_array(prompt):
        if ids.ndim != 1:
            shape = tuple(ids.shape)
            raise ValueError(
                f"an array of token ids must have one dimension, got shape {shape}: "
                "pass a list of unpadded rows"
            )
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or isinstance(ids, str | _BYTES):
        got = f"{type(prompt).__name__}{_remedy(prompt)}"
        raise ValueError(f"a prompt must be text or a list of token ids, got {got}")
    return [token if type(token) is int else _token_id(token) for token in ids]


def _remedy(prompt: object) -> str:
    if isinstance(prompt, dict):
        return ": pass messages as a list to chat()"
    return ": decode it to text" if isinstance(prompt, _BYTES) else ""


def _token_id(token: Any) -> int:
    if not _is_whole(token):
        raise ValueError(f"token ids must be whole numbers, got {excerpt(token)}")
    return int(token)


def _is_whole(value: Any) -> bool:
    """Return whether this is an integer of Python, numpy or torch."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    return _is_array(value) and value.ndim == 0 and type(value.tolist()) is int


def _is_array(value: object) -> bool:
    """Return whether this is an array or scalar of numpy, or a tensor."""
    return hasattr(value, "tolist") and hasattr(value, "ndim") and not isinstance(value, memoryview)


def _require_list(value: object, expected: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str | _BYTES):
        got = excerpt(value) if isinstance(value, str | int) else type(value).__name__
        raise ValueError(f"{expected}, got {got}")
