"""Proof that a model is still the one that its engine started with.

A recorded graph knows weights by their addresses, and a compiled step knows the modules that it was traced through: where a user
loads, moves or merges weights, or puts other modules in, both would go on with what they know, and eager steps would not.
"""

from typing import Any

from transformers import PreTrainedModel

from compiled_llm.models.attention_routing import ATTENTION_CHOICE, configs_of
from compiled_llm.models.mask_probe import MASK_PROBE_NAME


class ModelGuard:
    """What an attached model was when this was made.

    Args:
        model: after its weights were laid out.
        compiled: whether anything knows its weights by their addresses.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool) -> None:
        self._model = model
        self._choices = [
            (config, getattr(config, ATTENTION_CHOICE, None)) for config in configs_of(model)
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
        """Raise RuntimeError where something has changed; it takes some tens of microseconds."""
        if self._model.training:
            raise RuntimeError(
                "the model was put into training mode while an engine works on it: call its eval()"
            )
        for config, choice in self._choices:
            # Another engine that starts on the model looks at it for a moment, with attention that is as good.
            if getattr(config, ATTENTION_CHOICE, None) not in (choice, MASK_PROBE_NAME):
                raise self._refusal("attention was changed")
        for modules, name, child in self._children:
            if modules.get(name) is not child:
                raise self._refusal(f"module {self._prefix(modules)}{name} was replaced")
        for parameters, name, address in self._weights:
            weight = parameters.get(name)
            if weight is None or weight.data_ptr() != address:
                raise self._refusal(f"weight {self._prefix(parameters)}{name} was moved")

    def _refusal(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"the model's {what} while an engine works on it: close this engine and make a new one"
        )

    def _prefix(self, members: dict[str, Any]) -> str:
        """The name of the module that has these members, and a dot, where it still has a name."""
        for name, module in self._model.named_modules():
            if members is module._modules or members is module._parameters:
                return f"{name}." if name else ""
        return ""
