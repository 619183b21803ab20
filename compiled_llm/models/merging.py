"""Weights of linear layers that share an input, side by side in one storage, so that a pass can read them as one weight.

The modules stay as they are: each parameter becomes a view of the common storage, and remains one. Only one group at a time is
held twice.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@contextmanager
def linears_by_input(model: nn.Module) -> Iterator[list[list[nn.Linear]]]:
    """Fill a list with the groups of linear layers without bias that get the same tensor in the last forward while this is open."""
    calls: list[tuple[Tensor, nn.Linear]] = []  # holding the tensors keeps their identities apart
    groups: list[list[nn.Linear]] = []

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Linear) and arguments:
            calls.append((arguments[0], module))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if type(module) is nn.Linear]
    hooks.append(model.register_forward_pre_hook(lambda *_: calls.clear()))
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    by_input: dict[int, list[nn.Linear]] = {}
    for tensor, module in calls:
        by_input.setdefault(id(tensor), []).append(module)
    times_called = Counter(module for _, module in calls)
    times_held = Counter(map(_place, _all_parameters(model)))
    for modules in by_input.values():
        alike = [m for m in modules if not _has_bias(m) and times_called[m] == 1 and times_held[_place(m.weight)] == 1]
        if len(alike) > 1 and len({(m.weight.dtype, m.weight.device) for m in alike}) == 1:
            groups.append(alike)


_num_engines: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def merged(model: nn.Module, groups: list[list[nn.Linear]]) -> Iterator[None]:
    """Hold the weights of each group in one storage, in order, where they stay as long as this is open.

    Where another engine works on the model, its graphs know the weights by their addresses: then none is moved.
    """
    if not _num_engines.get(model):
        for group in groups:
            _merge(group)
    _num_engines[model] = _num_engines.get(model, 0) + 1
    try:
        yield
    finally:
        _num_engines[model] -= 1


def count_merged(model: nn.Module) -> int:
    """How many groups of weights share a storage, each with a part of its own."""
    parts: dict[int, set[object]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and not _has_bias(module):
            parts.setdefault(module.weight.untyped_storage().data_ptr(), set()).add(module.weight.storage_offset())
    return sum(len(offsets) > 1 for offsets in parts.values())


def _merge(group: list[nn.Linear]) -> None:
    if len({module.weight.untyped_storage().data_ptr() for module in group}) == 1:
        return
    together = torch.cat([module.weight.data for module in group])
    for module, weight in zip(group, together.split([m.out_features for m in group]), strict=True):
        module.weight.data = weight


def _place(parameter: Tensor) -> int:
    """Where it lies; on the meta device, where nothing lies, which it is."""
    return parameter.data_ptr() or id(parameter)


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter as often as a module holds it."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
