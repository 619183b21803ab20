"""Configs read from YAML files and `--set a.b=c`. Unknown keys are refused, with the nearest right name."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from compiled_llm.config.schema import Config, excerpt, nearest


class _Loader(yaml.SafeLoader):
    """Reads YAML, refuses a key that is given twice, and takes 1e3 for a number, as YAML 1.2 and JSON do."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(
                        f"key {excerpt(key.value)} is given twice, in lines {lines[key.value]} and {line}"
                    )
                lines[key.value] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and the files it extends, and apply overrides of the form `a.b=c`, c being YAML.

    Raises:
        ValueError: the file or a key cannot be used; the message is one line.
    """
    try:
        values = {} if path is None else _read(Path(path), ())
        for override in overrides:
            values = _merge(values, _parse_override(override))
    except RecursionError:
        raise ValueError(
            "the config nests or extends too deeply: expected at most some hundred levels"
        ) from None
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Validate plain values. Raises a one-line ValueError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        path = path.resolve()
        text = path.read_bytes().decode()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a RuntimeError tells of links that form a circle
        raise ValueError(f"config file {path} cannot be read: {_reason(error)}") from None
    if path in seen:
        raise ValueError(
            f"config {path} extends itself through {' -> '.join(p.name for p in seen)}"
        )
    values = _parse_yaml(text, f"config file {path}")
    if not isinstance(values, dict | None):
        raise ValueError(f"config file {path} must hold a mapping, got {type(values).__name__}")
    values = values or {}
    parent = values.pop("extends", None)
    if not isinstance(parent, str | None):
        raise ValueError(
            f"config file {path}: extends must be the path of one other config file, got {excerpt(parent)}"
        )
    _resolve_model_path(values, path.parent)
    return values if parent is None else _merge(_read(path.parent / parent, (*seen, path)), values)


def _parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document; raises a one-line ValueError that begins with the source."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"{source} is not valid YAML: it nests too deeply") from None
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # a ValueError tells of a date or number that does not exist
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start})"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _resolve_model_path(values: dict[str, Any], directory: Path) -> None:
    """A model path is relative to the file that names it."""
    model = values.get("model")
    if (
        isinstance(model, dict)
        and isinstance(model.get("name"), str)
        and os.path.exists(directory / model["name"])
    ):
        model["name"] = str(directory / model["name"])


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"override {excerpt(override)} must have the form a.b=c")
    value = _parse_yaml(text, f"override {excerpt(override)}")
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def _explain(error: ValidationError) -> str:
    """One line for all that is wrong; the alternatives of one key are joined."""
    complaints: dict[str, list[str]] = {}
    for detail in error.errors():
        section, path = _locate(detail["loc"])
        if detail["type"] == "extra_forbidden":
            complaint = f"it is unknown{nearest(path.rpartition('.')[2], section.model_fields)}"
        elif detail["type"] == "value_error":  # one of ours, which says what came
            complaint = str(detail["ctx"]["error"])
        else:
            complaint = f"{detail['msg']}, got {excerpt(detail['input'])}"
        complaints.setdefault(path, []).append(complaint)
    lines = {path: " or ".join(found) for path, found in complaints.items()}
    return "; ".join(
        f"config key {path!r}: {line}" if path else line for path, line in lines.items()
    )


def _locate(location: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """The section that an error stands in, and the key's path, without what pydantic adds for the alternatives of a union."""
    section: type[BaseModel] = Config
    path: list[str] = []
    for part in location:
        path.append(str(part))
        field = section.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            break
        section = field.annotation
    return section, ".".join(path)
