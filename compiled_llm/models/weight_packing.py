"""Weights of linear layers that share an input, side by side in one storage, so that a pass can read them as one weight.

The modules stay as they are: each parameter becomes a view of the common storage, and remains one. Only one group at a time is
held twice.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor, nn

from passes.merge_projections import are_packed


@contextmanager
def linears_by_input(model: nn.Module) -> Iterator[list[list[nn.Linear]]]:
    """Fill a list with the groups of linear layers without bias that get the same tensor in the last forward while this is open."""
    calls: list[tuple[Tensor, nn.Linear]] = []  # holding the tensors keeps their identities apart
    groups: list[list[nn.Linear]] = []

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Linear) and arguments:
            calls.append((arguments[0], module))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if type(module) is nn.Linear
    ]
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
        alike = [
            m
            for m in modules
            if not _has_bias(m) and times_called[m] == 1 and times_held[_place(m.weight)] == 1
        ]
        if len(alike) > 1 and len({(m.weight.dtype, m.weight.device) for m in alike}) == 1:
            groups.append(alike)


_LOCK = Lock()
_PINS: defaultdict[int, set[object]] = defaultdict(
    set
)  # who relies on the place of a parameter, by its id


@contextmanager
def packed_weights(model: nn.Module, groups: list[list[nn.Linear]]) -> Iterator[None]:
    """Hold the weights of each group in one storage, in order, where they stay as long as this is open.

    Where another engine works on a parameter, its graphs know that by its address: then it is not moved.
    """
    engine, parameters = (
        object(),
        list(model.parameters()),
    )  # held, so that their ids stay their own
    try:
        with _LOCK:
            for unused in [place for place, pins in _PINS.items() if not pins]:
                del _PINS[unused]
            for group in groups:
                if not any(_PINS.get(id(module.weight)) for module in group):
                    _merge(group)
            for parameter in parameters:
                _PINS[id(parameter)].add(engine)
        yield
    finally:  # maybe by the garbage collector, in the middle of the above: no lock, and no set leaves the dictionary
        for parameter in parameters:
            _PINS.get(id(parameter), set()).discard(engine)


def find_packed_groups(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of linear layers whose weights fill a storage that they share, in their order there.

    It is proven anew at each call: generated code reads such weights as one, wherever the first of them lies.
    """
    sharing: dict[int, dict[int, tuple[str, Tensor]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not _has_bias(module):
            weight = module.weight
            sharing.setdefault(weight.untyped_storage()._cdata, {})[
                int(weight.storage_offset())
            ] = (name, weight)
    groups = [[parts[offset] for offset in sorted(parts)] for parts in sharing.values()]
    return tuple(
        tuple(name for name, _ in group)
        for group in groups
        if are_packed([weight for _, weight in group])
    )


def _merge(group: list[nn.Linear]) -> None:
    weights = [module.weight.data for module in group]
    if are_packed(weights):
        return
    together = torch.cat(weights)
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
