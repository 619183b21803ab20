"""Rotary embeddings with position-dependent frequencies, fixed at those of short sequences.

transformers selects the frequencies of the rope types `longrope` and `dynamic` by the largest
position of a call. In a batch one long sequence would change them for all others, and the branch on
that position cannot be traced. Up to a length that the config gives they never change.
`fixed_frequencies` sets the rotary modules' attributes to those frequencies while an engine runs,
and `rotary_limit` returns the length that no sequence may exceed.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from compiled_llm.models.attribute_overrides import AttributeOverrides


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryLimit:
    """The most tokens a sequence may have for the frequencies of `rope_type` to stay the same."""

    rope_type: str
    length: int


def rotary_limit(config: PretrainedConfig) -> RotaryLimit | None:
    """Return the lowest limit of a model's rope types; None if its frequencies are constant."""
    text = config.get_text_config()
    limits = [limit for parameters in _rope_parameters(text) for limit in _limits(parameters, text)]
    return min(limits, key=lambda limit: limit.length, default=None)


@contextmanager
def fixed_frequencies(model: nn.Module) -> Iterator[None]:
    """Fix the frequencies of the model's rotary modules; the last user to exit restores them."""
    overrides = AttributeOverrides(_attributes(model))
    try:
        try:
            for module in model.modules():
                _fix_scale(module)
                _fix_frequencies(module)
        finally:
            overrides.record()
        yield
    finally:
        overrides.release()


class _FixedFrequencies(nn.Module):
    """Replacement of a rotary module's `rope_init_fn` where the forward itself calls that."""

    inv_freq: Tensor

    def __init__(self, inv_freq: Tensor, scale: float) -> None:
        super().__init__()
        self._scale = scale
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, config: object) -> tuple[Tensor, float]:
        """Return the frequencies, and the factor of sines and cosines."""
        return self.inv_freq, self._scale


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the parameters that all layers share, or those of each type of layer."""
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
    """Return whether sines and cosines of long sequences have a scale of their own (phimoe)."""
    return parameters.get("rope_type", "default") != "default" and "long_mscale" in parameters


def _attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the attributes of all rotary modules that `fixed_frequencies` may change.

    Attributes that need no change are included: once the first user has changed the modules, a
    second user finds nothing to change, but must hold the same attributes.
    """
    for module in model.modules():
        names = {"rope_type", "config", "rope_init_fn"} | {
            f"{prefix}inv_freq" for prefix in _rope_types(module)
        }
        if hasattr(module, "rope_type") or hasattr(module, "rope_init_fn"):
            yield from ((module, name) for name in sorted(names) if hasattr(module, name))


def _rope_types(module: nn.Module) -> dict[str, Any]:
    """Return the module's rope types by the prefix that the names of their buffers have."""
    rope_type: Any = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):  # one for each type of layer
        return {f"{name}_": kind for name, kind in rope_type.items()}
    return {"": rope_type}


def _fix_frequencies(module: nn.Module) -> None:
    """Disable transformers' `dynamic_rope_update`, which depends on the module's `rope_type`."""
    kinds = _rope_types(module)
    changing = [
        prefix for prefix, kind in kinds.items() if isinstance(kind, str) and _changes(kind)
    ]
    has_original = [hasattr(module, f"{prefix}original_inv_freq") for prefix in changing]
    if not changing or not all(has_original):
        return
    for prefix in changing:
        device = getattr(module, f"{prefix}inv_freq").device
        original = getattr(module, f"{prefix}original_inv_freq")
        setattr(module, f"{prefix}inv_freq", original.to(device))
    fixed = {prefix: "default" if prefix in changing else kind for prefix, kind in kinds.items()}
    if isinstance(module.rope_type, dict):
        fixed_type: Any = {prefix[:-1]: kind for prefix, kind in fixed.items()}
    else:
        fixed_type = fixed[""]
    module.rope_type = fixed_type


def _fix_scale(module: nn.Module) -> None:
    """Fix the scale and frequencies of phimoe, whose forward recomputes both in each call."""
    config: Any = getattr(module, "config", None)
    initialise: Any = getattr(module, "rope_init_fn", None)
    parameters = getattr(config, "rope_parameters", None)
    if initialise is None or not isinstance(parameters, dict) or not _has_scales(parameters):
        return
    inv_freq = initialise(config)[0].to(module.get_buffer("inv_freq").device)
    fixed = copy.deepcopy(config)
    fixed.rope_parameters["rope_type"] = "default"
    module.config = fixed
    module.rope_init_fn = _FixedFrequencies(inv_freq, parameters["short_mscale"])


def _changes(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"
