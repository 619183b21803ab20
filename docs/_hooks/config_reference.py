"""MkDocs hook: generate the tables of configuration.md from the schema of `compiled_llm.Config`.

`<!-- config reference -->` becomes a section for each section of the schema: its docstring, and a
table of its keys with type, default and meaning. A key's meaning is the description of its field
or, where it has none, the paragraph `key: meaning` of the section's docstring.
"""

import inspect
import json
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, StrictBool, ValidationError
from pydantic.fields import FieldInfo

_MARKER = "<!-- config reference -->"
_HEADINGS = ("Args:", "Attributes:")
_BOOLEANS = (bool, StrictBool)
_BOUNDS = {"ge": " from", "gt": " above", "le": " to", "lt": ", below"}
_SIZE = "a size such as `2GiB`, or bytes"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker, on the page that has it."""
    if _MARKER not in markdown:
        return markdown
    from compiled_llm import Config

    return markdown.replace(_MARKER, "\n".join(_reference(Config)))


def _reference(config: type[BaseModel]) -> list[str]:
    sections = {name: _section(field) for name, field in config.model_fields.items()}
    lines = []
    for name, section in sections.items():
        if section is not None:
            lines += ["", f"### `{name}`", "", *_section_lines(section, list(section.model_fields))]
    top_level = [name for name, section in sections.items() if section is None]
    return [*lines, "", "### Keys of the top level", "", *_section_lines(config, top_level)]


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _section_lines(section: type[BaseModel], names: list[str]) -> list[str]:
    prose, meanings = split_docstring(inspect.getdoc(section) or "", set(section.model_fields))
    hints = get_type_hints(section, include_extras=True)
    rows = []
    for name in names:
        field = section.model_fields[name]
        is_size = _takes_sizes(section, name)
        kind = _describe(hints[name], () if not is_size else (_SIZE,))
        default = _default(field.get_default(call_default_factory=True), is_size=is_size)
        meaning = " ".join((field.description or meanings.get(name, "")).split())
        rows.append(f"| `{name}` | {kind} | {default} | {meaning} |")
    return [*prose, "", "| key | values | default | meaning |", "|---|---|---|---|", *rows]


def split_docstring(docstring: str, names: set[str]) -> tuple[list[str], dict[str, str]]:
    """Return the lines of prose, and the meaning of each key that has a paragraph `key: ...`."""
    prose: list[str] = []
    meanings: dict[str, str] = {}
    current = None
    for line in map(str.strip, docstring.splitlines()):
        key, colon, text = line.partition(":")
        if colon and set(re.split(r",\s*", key)) <= names:
            current = key
            meanings |= dict.fromkeys(re.split(r",\s*", key), text.strip())
        elif current is not None and line:
            for name in re.split(r",\s*", current):
                meanings[name] += f" {line}"
        else:
            current = None
            prose += [] if line in _HEADINGS else [line]
    return prose, {name: text[:1].upper() + text[1:] for name, text in meanings.items()}


def _takes_sizes(section: type[BaseModel], name: str) -> bool:
    """Whether a key takes sizes with units, found by trying one."""
    try:
        return getattr(section.model_validate({name: "2GiB"}), name) == 2**31
    except ValidationError:
        return False


def _describe(kind: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Describe in words what an annotation admits; `metadata` comes from an outer `Annotated`."""
    kind = getattr(kind, "__value__", kind)  # a `type` alias
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _describe(arguments[0], (*arguments[1:], *metadata))
    if origin in (Union, UnionType):
        described = dict.fromkeys(_describe(each, metadata) for each in arguments)
        return ", or ".join(sorted(described, key=_rank))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"a list of: {_describe(arguments[0])}"
    if origin is dict:
        return "names with `on` or `off`" if arguments[1] in _BOOLEANS else "a mapping"
    if kind in (int, float):
        noun = "integer" if kind is int else "number"
        return _SIZE if _SIZE in metadata else f"{noun}{_bounds(kind, metadata)}"
    if kind in _BOOLEANS:
        return "`true`, `false`"
    return {NoneType: "`null`", str: "text", Path: "a path"}.get(kind, "any")


def _rank(description: str) -> int:
    """Order the alternatives of a union: `auto` first, null last."""
    return {"`auto`": 0, "`null`": 2}.get(description, 1)


def _bounds(kind: type, metadata: tuple[Any, ...]) -> str:
    """Describe the bounds among the metadata, which may stand inside a pydantic field."""
    flat = [part for each in metadata for part in getattr(each, "metadata", [each])]
    found = {name: getattr(part, name) for part in flat for name in _BOUNDS if hasattr(part, name)}
    if kind is int:  # integers have inclusive bounds
        found |= {"ge": found.pop("gt") + 1} if "gt" in found else {}
    return "".join(f"{_BOUNDS[name]} {_number(value)}" for name, value in sorted(found.items()))


def _number(value: float) -> str:
    whole = int(value)
    is_power = whole == value and whole > 2**16 and whole & (whole - 1) == 0
    return f"2<sup>{whole.bit_length() - 1}</sup>" if is_power else f"{value:,g}"


def _default(value: object, *, is_size: bool) -> str:
    if is_size and isinstance(value, int):
        return f"`{value // 2**30}GiB`"
    if isinstance(value, str | Path):
        return f"`{value}`"
    return f"`{json.dumps(value)}`"
