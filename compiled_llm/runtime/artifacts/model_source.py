"""Which code a model runs: what an artifact's key says of it.

Where `from_pretrained` loaded a model that runs transformers' and torch's own code alone, the source of its classes, its config
and the versions of both packages determine what it computes. Any other model is identified by the graph of its step: one that the
caller made and may have changed, one whose checkpoint brings code, one whose classes or functions were patched. That costs the
tracing of a step, and of each bucket that is loaded.
"""

import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.modules.module as module_state
import transformers
from torch import nn
from transformers import PreTrainedModel

# An artifact's key holds the versions of all of these.
_PACKAGES = tuple(f"{Path(package.__path__[0]).resolve()}/" for package in (torch, transformers))
_STDLIB = f"{Path(sysconfig.get_path('stdlib')).resolve()}/"
# By functions of its own, in any process in which torch.compile has checked guards (torch/_dynamo/mutation_guard.py).
_REPLACED_BY_DYNAMO = {
    f"torch.nn.modules.module.Module.{name}" for name in ("__init__", "__setstate__")
}
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


@dataclass(frozen=True, slots=True)
class ModelCode:
    """What a model runs, in words; `by_graph` where that is the graph of one of its steps."""

    words: str
    by_graph: bool


def identify(
    model: PreTrainedModel, trace_step: Callable[[], str], *, just_loaded: bool
) -> ModelCode:
    """Identify what a model runs.

    Args:
        trace_step: digest of the graph of one of its steps.
        just_loaded: nobody has had the model since transformers loaded it.

    Raises:
        ValueError: the step cannot be traced, or its graph does not show all that it computes.
    """
    source = library_source(model) if just_loaded else None
    if source is not None:
        return ModelCode(f"transformers' own, source {source[:12]}", by_graph=False)
    try:
        return ModelCode(f"graph {trace_step()[:16]}", by_graph=True)
    except Exception as error:  # whatever tracing raises
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"it is not known which code the model runs: {said}") from error


def library_source(model: PreTrainedModel) -> str | None:
    """Digest of the source of a model's classes; None where some of its code is not transformers' or torch's own, or was patched.

    Functions are checked in the classes of the model's modules, in the files that define the model, and in
    `torch.nn.functional`. The modules' own attributes are not looked at: a model that was just loaded has those that its config
    gives it.
    """
    classes = {
        kind
        for module in model.modules()
        for kind in type(module).__mro__
        if issubclass(kind, nn.Module)
    }
    names = sorted({kind.__module__ for kind in classes})
    if any(getattr(module_state, hooks) for hooks in _GLOBAL_HOOKS) or not all(
        map(_is_library_module, names)
    ):
        return None
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\n".encode() + Path(str(sys.modules[name].__file__)).read_bytes())
    for place, function in _functions(
        classes, [name for name in names if name.startswith("transformers.models.")]
    ):
        code = function.__code__
        if not _is_library_file(code.co_filename):
            return None
        if place not in _REPLACED_BY_DYNAMO:
            digest.update(
                f"{place} {Path(code.co_filename).name} {code.co_qualname} {code.co_firstlineno}\n".encode()
            )
    return digest.hexdigest()


def snapshot(model: PreTrainedModel) -> object:
    """A value that stays equal as long as no module of the model gets another attribute, child, hook or class."""
    modules = [(name, type(module), _attributes(module)) for name, module in model.named_modules()]
    return modules, model.config.to_json_string(use_diff=False), library_source(model)


def _attributes(module: nn.Module) -> list[tuple[str, object]]:
    return [(name, _value(value)) for name, value in vars(module).items()]


def _value(value: object) -> object:
    """Scalars by value, dicts of modules, parameters and hooks by their members, everything else by identity."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    return (
        [(key, id(member)) for key, member in value.items()]
        if isinstance(value, dict)
        else id(value)
    )


def _functions(classes: set[type], names: list[str]) -> Iterator[tuple[str, types.FunctionType]]:
    """The functions in classes, in the Python modules of these names and in `torch.nn.functional`, each with its place."""
    owners: dict[str, Mapping[str, Any]] = {
        f"{kind.__module__}.{kind.__qualname__}": vars(kind) for kind in classes
    }
    owners |= {name: vars(sys.modules[name]) for name in [*names, "torch.nn.functional"]}
    for name in names:  # classes that the model makes while it runs, such as those of its outputs
        owners |= {
            f"{name}.{kind.__name__}": vars(kind)
            for kind in vars(sys.modules[name]).values()
            if _is_module(kind)
        }
    for owner, members in sorted(owners.items()):
        for name, value in sorted(members.items()):
            for function in _layers(value):
                yield f"{owner}.{name}", function


def _layers(value: Any) -> Iterator[types.FunctionType]:
    """A function, and the one that its decorators wrap."""
    function = getattr(value, "__func__", getattr(value, "fget", value))
    if isinstance(function, types.FunctionType):
        yield function
        wrapped = inspect.unwrap(function)
        if wrapped is not function and isinstance(wrapped, types.FunctionType):
            yield wrapped


def _is_module(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _is_library_module(name: str) -> bool:
    return _is_library_file(getattr(sys.modules.get(name), "__file__", None) or "")


def _is_library_file(file: str) -> bool:
    """Whether code is torch's, transformers' or Python's own."""
    if file.startswith("<frozen "):
        return True
    path = str(Path(file).resolve())
    return path.startswith(_PACKAGES) or (path.startswith(_STDLIB) and "-packages/" not in path)
