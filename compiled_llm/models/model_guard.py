"""Detect changes to a model while an engine uses it.

A CUDA graph refers to weights by their addresses, and a compiled step to the modules that it was
traced through. Where a user loads, moves or merges weights, or replaces modules, compiled steps
would continue with the old ones, and eager steps would not.
"""

from typing import Any

from transformers import PreTrainedModel

from compiled_llm.models.attention_routing import ATTENTION_ATTRIBUTE, configs_of
from compiled_llm.models.mask_probe import MASK_PROBE_NAME


class ModelGuard:
    """The state of a routed model when the guard is created.

    Args:
        model: the model, after its weights were packed.
        compiled: whether steps are compiled, so that modules and weights must stay in place.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool) -> None:
        self._model = model
        self._implementations = [
            (config, getattr(config, ATTENTION_ATTRIBUTE, None)) for config in configs_of(model)
        ]
        holders = list(model.modules()) if compiled else []
        self._children = [
            (holder._modules, name, child)
            for holder in holders
            for name, child in holder._modules.items()
        ]
        self._weights = [
            (holder._parameters, name, weight.data_ptr())
            for holder in holders
            for name, weight in holder._parameters.items()
            if weight is not None
        ]

    def check(self) -> None:
        """Check that the model is unchanged; this takes some tens of microseconds.

        Raises:
            RuntimeError: the model is in training mode, its attention implementation was changed, a
                module was replaced or a weight was moved.
        """
        if self._model.training:
            raise RuntimeError(
                "expected the model in eval mode while an engine uses it, got training mode: call "
                "model.eval()"
            )
        for config, implementation in self._implementations:
            # Another engine that examines the model changes the implementation for that time.
            if getattr(config, ATTENTION_ATTRIBUTE, None) not in (implementation, MASK_PROBE_NAME):
                raise _error("attention implementation was changed")
        for modules, name, child in self._children:
            if modules.get(name) is not child:
                raise _error(f"module {self._prefix(modules)}{name} was replaced")
        for parameters, name, address in self._weights:
            weight = parameters.get(name)
            if weight is None or weight.data_ptr() != address:
                raise _error(f"weight {self._prefix(parameters)}{name} was moved")

    def _prefix(self, members: dict[str, Any]) -> str:
        """Return the name of the module that has these members, and a dot; "" if it has no name."""
        for name, module in self._model.named_modules():
            if members is module._modules or members is module._parameters:
                return f"{name}." if name else ""
        return ""


def _error(change: str) -> RuntimeError:
    return RuntimeError(
        f"the model's {change} while an engine uses it: close this engine and create a new one"
    )
