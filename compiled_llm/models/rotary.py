"""Rotary embeddings with position-dependent frequencies, fixed at those of short sequences while an engine runs.

transformers selects the frequencies of the rope types `longrope` and `dynamic` by the largest position of a call, so in a
batch one long sequence changes them for all others, and the branch on that position cannot be traced. Up to a length that the
config gives they never change. `fixed_frequencies` sets the rotary modules to those frequencies through their attributes, and
`rotary_limit` is the length that no sequence may exceed.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryLimit:
    """The most tokens a sequence may have for the frequencies of `rope_type` to stay the same."""

    rope_type: str
    length: int


def rotary_limit(config: PretrainedConfig) -> RotaryLimit | None:
    """Return the lowest limit of a model's rope types, or None where no frequency depends on the positions of a call."""
    text = config.get_text_config()
    limits = [limit for parameters in _rope_parameters(text) for limit in _limits(parameters, text)]
    return min(limits, key=lambda limit: limit.length, default=None)


@contextmanager
def fixed_frequencies(model: nn.Module) -> Iterator[None]:
    """Fix the frequencies of the model's rotary modules; restore the modules when the last user of the model has left."""
    with _LOCK:
        users = _USERS.setdefault(model, _Users())
        if not users.count:
            users.restore = _fix(model)
        users.count += 1
    try:
        yield
    finally:
        with _LOCK:
            users.count -= 1
            if not users.count:
                users.restore.close()


@dataclass(slots=True)
class _Users:
    """How many users of a model there are, and what restores it."""

    count: int = 0
    restore: ExitStack = field(default_factory=ExitStack)


_LOCK = threading.Lock()
_USERS: WeakKeyDictionary[nn.Module, _Users] = WeakKeyDictionary()


class _FixedFrequencies(nn.Module):
    """Takes the place of a rotary module's `rope_init_fn` where the forward itself calls that."""

    inv_freq: Tensor

    def __init__(self, inv_freq: Tensor, scale: float) -> None:
        super().__init__()
        self._scale = scale
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, config: object) -> tuple[Tensor, float]:
        """The frequencies, and what sines and cosines are multiplied by."""
        return self.inv_freq, self._scale


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of all layers, or of each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _limits(parameters: dict[str, Any], config: PretrainedConfig) -> Iterator[RotaryLimit]:
    rope_type = str(parameters.get("rope_type", parameters.get("type", "default")))
    original = parameters.get("original_max_position_embeddings")
    if original is not None and (rope_type == "longrope" or _has_scales(parameters)):
        yield RotaryLimit(rope_type=rope_type, length=int(original))
    if "dynamic" in rope_type:
        yield RotaryLimit(rope_type=rope_type, length=int(config.max_position_embeddings))


def _has_scales(parameters: dict[str, Any]) -> bool:
    """Whether sines and cosines of long sequences are scaled in another way, as in phimoe."""
    return parameters.get("rope_type", "default") != "default" and "long_mscale" in parameters


def _fix(model: nn.Module) -> ExitStack:
    """Fix all rotary modules; returns what restores them."""
    with ExitStack() as restore:
        for module in model.modules():
            _fix_scale(module, restore)
            _fix_frequencies(module, restore)
        return restore.pop_all()


def _fix_frequencies(module: nn.Module, restore: ExitStack) -> None:
    """Skip the updates of transformers' `dynamic_rope_update`, which depend on the module's `rope_type` alone."""
    rope_type = getattr(module, "rope_type", None)
    by_layer = isinstance(rope_type, dict)
    kinds = (
        {f"{name}_": kind for name, kind in rope_type.items()}
        if isinstance(rope_type, dict)
        else {"": rope_type}
    )
    changing = [
        prefix for prefix, kind in kinds.items() if isinstance(kind, str) and _changes(kind)
    ]
    if not changing or not all(
        hasattr(module, f"{prefix}original_inv_freq") for prefix in changing
    ):
        return
    for prefix in changing:
        current, original = (
            getattr(module, f"{prefix}{name}") for name in ("inv_freq", "original_inv_freq")
        )
        _replace(module, f"{prefix}inv_freq", original.to(current.device), restore)
    fixed = {prefix: "default" if prefix in changing else kind for prefix, kind in kinds.items()}
    _replace(
        module,
        "rope_type",
        {prefix[:-1]: kind for prefix, kind in fixed.items()} if by_layer else fixed[""],
        restore,
    )


def _fix_scale(module: nn.Module, restore: ExitStack) -> None:
    """phimoe selects a scale by the largest position, and computes its frequencies anew in each call."""
    config: Any = getattr(module, "config", None)
    initialise: Any = getattr(module, "rope_init_fn", None)
    parameters = getattr(config, "rope_parameters", None)
    if initialise is None or not isinstance(parameters, dict) or not _has_scales(parameters):
        return
    inv_freq = initialise(config)[0].to(module.get_buffer("inv_freq").device)
    fixed = copy.deepcopy(config)
    fixed.rope_parameters["rope_type"] = "default"
    _replace(module, "config", fixed, restore)
    _replace(
        module, "rope_init_fn", _FixedFrequencies(inv_freq, parameters["short_mscale"]), restore
    )


def _changes(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _replace(module: nn.Module, name: str, value: Any, restore: ExitStack) -> None:
    """Set an attribute or buffer; a module takes the place of a function."""
    before = getattr(module, name)

    def put_back() -> None:
        if name in module._modules:
            delattr(module, name)
        setattr(module, name, before)

    restore.callback(put_back)
    with torch.no_grad():
        setattr(module, name, value)
