"""Read configs from YAML files and `--set a.b=c`; refuse unknown keys, naming the nearest key."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from compiled_llm.config.messages import excerpt, suggestion
from compiled_llm.config.schema import Config


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys and reads 1e3 as a number, as YAML 1.2 does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(
                        f"key {excerpt(key.value)} is given twice, in lines {lines[key.value]} "
                        f"and {line}"
                    )
                lines[key.value] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and the files that it extends, and apply overrides.

    Args:
        path: a YAML file; None for the defaults.
        overrides: texts of the form `a.b=c`, where c is YAML. Later ones win.

    Raises:
        ValueError: a file or key cannot be used; the message is one line.
    """
    try:
        values = {} if path is None else _read(Path(path), ())
        for override in overrides:
            values = _merge(values, _parse_override(override))
    except RecursionError:
        raise ValueError(
            "the config nests or extends too deeply: expected at most a few hundred levels"
        ) from None
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Return the config of nested plain values, such as a parsed YAML file.

    Raises:
        ValueError: a key or value is not valid; the message is one line and names all of them.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(_describe(error)) from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return the values of a file, merged over those of the files it extends.

    Args:
        path: the file.
        seen: the files that extend it, to detect a circle.
    """
    try:
        path = path.resolve()
        text = path.read_bytes().decode()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a circle of symlinks
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
            f"config file {path}: extends must be the path of one other config file, "
            f"got {excerpt(parent)}"
        )
    _resolve_model_path(values, path.parent)
    return values if parent is None else _merge(_read(path.parent / parent, (*seen, path)), values)


def _parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document; the message of a ValueError begins with `source`."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"{source} is not valid YAML: it nests too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start})"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _resolve_model_path(values: dict[str, Any], directory: Path) -> None:
    """Make the path of a model relative to the directory of the config that names it."""
    model = values.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(name, str) and os.path.exists(directory / name):
        model["name"] = str(directory / name)


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
    """Return `base` with the values of `over`; nested mappings are merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        nested = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old or {}, value) if nested else value
    return merged


def _describe(error: ValidationError) -> str:
    """Return all errors as one line; those of one key's alternatives are joined by "or"."""
    complaints: dict[str, list[str]] = {}
    for detail in error.errors():
        section, path = _locate(detail["loc"])
        if detail["type"] == "extra_forbidden":
            near = suggestion(path.rpartition(".")[2], section.model_fields)
            complaint = f"it is unknown{near}"
        elif detail["type"] == "value_error":  # raised by the schema; its text has the value
            complaint = str(detail["ctx"]["error"])
        else:
            complaint = f"{detail['msg']}, got {excerpt(detail['input'])}"
        complaints.setdefault(path, []).append(complaint)
    lines = {path: " or ".join(found) for path, found in complaints.items()}
    return "; ".join(
        f"config key {path!r}: {line}" if path else line for path, line in lines.items()
    )


def _locate(location: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """Return an error's section and key, without the parts that pydantic adds for a union."""
    section: type[BaseModel] = Config
    path: list[str] = []
    for part in location:
        path.append(str(part))
        field = section.model_fields.get(str(part))
        kind = None if field is None else field.annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            break
        section = kind
    return section, ".".join(path)
