"""Pack weights of linear layers with one input into one storage, so that a pass can merge them.

The modules stay as they are: each parameter becomes a view of the shared storage. Only one group's
weights are in memory twice at a time.
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
    """Record groups of linear layers that get the same tensor in the last forward before exit.

    Yields:
        A list that is filled on exit. A group has at least two layers, all without bias, called
        once, and with weights of one dtype that no other module uses.
    """
    # The list keeps the input tensors alive, so that their ids stay distinct.
    calls: list[tuple[Tensor, nn.Linear]] = []
    groups: list[list[nn.Linear]] = []

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Linear) and arguments:
            calls.append((arguments[0], module))

    hooks = [
        module.register_forward_pre_hook(record)
        for module in model.modules()
        if type(module) is nn.Linear
    ]
    hooks.append(model.register_forward_pre_hook(lambda *_: calls.clear()))
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    groups += _packable_groups(model, calls)


def _packable_groups(
    model: nn.Module, calls: list[tuple[Tensor, nn.Linear]]
) -> Iterator[list[nn.Linear]]:
    by_input: dict[int, list[nn.Linear]] = {}
    for tensor, module in calls:
        by_input.setdefault(id(tensor), []).append(module)
    num_calls = Counter(module for _, module in calls)
    num_users = Counter(map(_address, _all_parameters(model)))
    for modules in by_input.values():
        group = [
            module
            for module in modules
            if not _has_bias(module)
            and num_calls[module] == 1
            and num_users[_address(module.weight)] == 1
        ]
        kinds = {(module.weight.dtype, module.weight.device) for module in group}
        if len(group) > 1 and len(kinds) == 1:
            yield group


_LOCK = Lock()
# The engines that rely on the address of a parameter, by the parameter's id.
_PINS: defaultdict[int, set[object]] = defaultdict(set)


@contextmanager
def packed_weights(model: nn.Module, groups: list[list[nn.Linear]]) -> Iterator[None]:
    """Pack the weights of each group, in order, and keep all parameters in place until exit.

    A group with a parameter that another engine uses is left where it is, since that engine's
    graphs refer to it by its address.
    """
    engine = object()
    parameters = list(model.parameters())  # kept alive, so that their ids are not reused
    try:
        with _LOCK:
            for unused in [key for key, engines in _PINS.items() if not engines]:
                del _PINS[unused]
            for group in groups:
                if not any(_PINS.get(id(module.weight)) for module in group):
                    _pack(group)
            for parameter in parameters:
                _PINS[id(parameter)].add(engine)
        yield
    finally:
        # The garbage collector may run this in the middle of the block above. So it takes no lock
        # and removes no set from the dictionary.
        for parameter in parameters:
            _PINS.get(id(parameter), set()).discard(engine)


def find_packed_groups(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the names of linear layers whose weights fill a shared storage, in storage order.

    The weights are examined at each call: generated code reads such weights as one, starting at the
    first of them, wherever that is.
    """
    sharing: dict[int, dict[int, tuple[str, Tensor]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not _has_bias(module):
            weight = module.weight
            parts = sharing.setdefault(weight.untyped_storage()._cdata, {})
            parts[int(weight.storage_offset())] = (name, weight)
    groups = [[parts[offset] for offset in sorted(parts)] for parts in sharing.values()]
    return tuple(
        tuple(name for name, _ in group)
        for group in groups
        if are_packed([weight for _, weight in group])
    )


def _pack(group: list[nn.Linear]) -> None:
    weights = [module.weight.data for module in group]
    if are_packed(weights):
        return
    packed = torch.cat(weights)
    for module, weight in zip(group, packed.split([m.out_features for m in group]), strict=True):
        module.weight.data = weight


def _address(parameter: Tensor) -> int:
    """Return the parameter's address; on the meta device, which has none, its id."""
    return parameter.data_ptr() or id(parameter)


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter as often as modules hold it."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
