"""Identify the code that a model runs, for the key of an artifact.

A model that `from_pretrained` loaded and that runs only code of transformers and torch is
identified by the source of its classes; with its config and the versions of both packages, that
determines what it computes. Any other model is identified by the graph of its step: a model that
the caller built and may have changed, one whose checkpoint contains code, or one with patched
classes or functions. This requires tracing one step, and one for each bucket that is loaded.
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
import transformers
from torch import nn
from transformers import PreTrainedModel

from compiled_llm.system.torch_patches import GLOBAL_FORWARD_HOOKS, GLOBAL_FORWARD_PRE_HOOKS

# An artifact's key holds the versions of all of these.
_PACKAGES = tuple(f"{Path(package.__path__[0]).resolve()}/" for package in (torch, transformers))
_STDLIB = f"{Path(sysconfig.get_path('stdlib')).resolve()}/"
# torch/_dynamo/mutation_guard.py replaces these in each process in which torch.compile has checked
# guards.
_REPLACED_BY_DYNAMO = {
    f"torch.nn.modules.module.Module.{name}" for name in ("__init__", "__setstate__")
}


@dataclass(frozen=True, slots=True)
class ModelCode:
    """A description of the code that a model runs.

    Attributes:
        words: part of an artifact's key.
        by_graph: whether it is the graph of one of the model's steps.
    """

    words: str
    by_graph: bool


def identify(
    model: PreTrainedModel, trace_step: Callable[[], str], *, just_loaded: bool
) -> ModelCode:
    """Identify the code that a model runs.

    Args:
        model: in any state.
        trace_step: returns the digest of the graph of one of its steps.
        just_loaded: whether no caller has had access to the model since transformers loaded it.

    Raises:
        ValueError: the step cannot be traced, or its graph calls code that it does not contain.
    """
    source = library_source(model) if just_loaded else None
    if source is not None:
        return ModelCode(f"transformers' own, source {source[:12]}", by_graph=False)
    try:
        return ModelCode(f"graph {trace_step()[:16]}", by_graph=True)
    except Exception as error:  # tracing may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the code that the model runs cannot be identified: {reason}") from error


def library_source(model: PreTrainedModel) -> str | None:
    """Return a digest of the source of a model's classes, or None.

    None means that some of its code does not come from transformers or torch, or was patched. The
    functions checked are those in the classes of the model's modules, in the files that define the
    model, and in `torch.nn.functional`. Attributes of the modules are not checked: those of a model
    that was just loaded follow from its config.
    """
    classes = {
        kind
        for module in model.modules()
        for kind in type(module).__mro__
        if issubclass(kind, nn.Module)
    }
    names = sorted({kind.__module__ for kind in classes})
    if GLOBAL_FORWARD_HOOKS.get() or GLOBAL_FORWARD_PRE_HOOKS.get():
        return None
    if not all(map(_is_library_module, names)):
        return None
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\n".encode() + Path(str(sys.modules[name].__file__)).read_bytes())
    models = [name for name in names if name.startswith("transformers.models.")]
    for place, function in _functions(classes, models):
        code = function.__code__
        if not _is_library_file(code.co_filename):
            return None
        if place not in _REPLACED_BY_DYNAMO:
            line = f"{code.co_qualname} {code.co_firstlineno}"
            digest.update(f"{place} {Path(code.co_filename).name} {line}\n".encode())
    return digest.hexdigest()


def snapshot(model: PreTrainedModel) -> object:
    """Return a value that changes when a module gets another attribute, child, hook or class."""
    modules = [(name, type(module), _attributes(module)) for name, module in model.named_modules()]
    return modules, model.config.to_json_string(use_diff=False), library_source(model)


def _attributes(module: nn.Module) -> list[tuple[str, object]]:
    return [(name, _value(value)) for name, value in vars(module).items()]


def _value(value: object) -> object:
    """Return scalars by value, dicts by the identities of their members, others by identity."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    if isinstance(value, dict):  # modules, parameters or hooks
        return [(key, id(member)) for key, member in value.items()]
    return id(value)


def _functions(classes: set[type], names: list[str]) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield functions with their places.

    They are those in the classes, in the Python modules of these names, and in
    `torch.nn.functional`.
    """
    owners: dict[str, Mapping[str, Any]] = {
        f"{kind.__module__}.{kind.__qualname__}": vars(kind) for kind in classes
    }
    owners |= {name: vars(sys.modules[name]) for name in [*names, "torch.nn.functional"]}
    for name in names:  # classes that the model instantiates while it runs, such as its outputs
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
    """Yield a function and the function that its decorators wrap."""
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
    """Return whether a file belongs to torch, transformers or Python's standard library."""
    if file.startswith("<frozen "):
        return True
    path = str(Path(file).resolve())
    return path.startswith(_PACKAGES) or (path.startswith(_STDLIB) and "-packages/" not in path)
