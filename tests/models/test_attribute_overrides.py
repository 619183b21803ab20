"""Tests of attribute overrides: they are restored by the last holder, in any order of release."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from compiled_llm.models.attribute_overrides import AttributeOverrides


class _Plain:
    value = 0


def _override(owner: object, name: str, value: object) -> AttributeOverrides:
    overrides = AttributeOverrides([(owner, name)])
    setattr(owner, name, value)
    overrides.record()
    return overrides


@pytest.mark.parametrize("first_releases_first", [True, False])
def test_the_last_holder_restores_the_value(first_releases_first: bool) -> None:
    shared = _Plain()
    holders = [_override(shared, "value", 1), _override(shared, "value", 2)]
    if not first_releases_first:
        holders.reverse()
    holders[0].release()
    assert shared.value == 2
    holders[1].release()
    assert shared.value == 0


def test_a_value_set_by_others_is_kept() -> None:
    shared = _Plain()
    overrides = _override(shared, "value", 1)
    shared.value = 5
    overrides.release()
    assert shared.value == 5


def test_a_tensor_is_compared_by_identity() -> None:
    module = nn.Module()
    before = torch.zeros(3)
    module.register_buffer("state", before)
    overrides = _override(module, "state", torch.ones(3))
    module.state = torch.ones(3)  # equal to the override, but set by someone else
    overrides.release()
    assert torch.equal(module.state, torch.ones(3))
    overrides = _override(module, "state", torch.ones(3))
    mine = module.state
    overrides.release()
    assert module.state is not mine


def test_a_submodule_in_place_of_a_function_is_removed() -> None:
    module = nn.Module()
    module.compute = abs  # type: ignore[assignment]
    overrides = _override(module, "compute", nn.Identity())
    assert list(module._modules) == ["compute"]
    overrides.release()
    assert module.compute is abs
    assert not module._modules


def test_a_holder_may_be_released_while_another_is_created() -> None:
    """The garbage collector, which may run at any allocation, releases holders that way."""
    shared = _Plain()
    first = _override(shared, "value", 1)

    def attributes() -> Iterator[tuple[object, str]]:
        yield shared, "value"
        first.release()
        yield shared, "other"

    second = AttributeOverrides(attributes())
    assert shared.value == 1, "the second holds it"
    shared.other = 2  # type: ignore[attr-defined]
    second.record()
    second.release()
    second.release()
    assert shared.value == 0
    assert not hasattr(shared, "other")


def test_an_interrupted_constructor_holds_nothing() -> None:
    shared = _Plain()

    def attributes() -> Iterator[tuple[object, str]]:
        yield shared, "value"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AttributeOverrides(attributes())
    _override(shared, "value", 1).release()
    assert shared.value == 0
