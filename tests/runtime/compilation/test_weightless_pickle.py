"""Pickling without the contents of large tensors."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from compiled_llm.runtime.compilation import weightless_pickle
from tests.conftest import DEVICE

LARGE = 2**17  # elements; more than are pickled with their contents


class Tied(nn.Module):
    """Tied parameters, parameters in one storage, and small tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(LARGE, device=DEVICE), requires_grad=False)
        self.same = self.weight
        together = torch.zeros(2, LARGE, device=DEVICE)
        self.first, self.second = (nn.Parameter(half, requires_grad=False) for half in together)
        self.register_buffer("scale", torch.arange(6.0, device=DEVICE).view(2, 3).T)


class Tagged(Tensor):
    """A subclass of Tensor."""


def test_a_module_is_pickled_without_its_large_tensors() -> None:
    model = Tied()
    content = weightless_pickle.dumps([model, model.weight])
    assert len(content) < 10_000
    loaded, weight = weightless_pickle.loads(content)
    assert loaded.weight is loaded.same
    assert loaded.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert (weight.shape, weight.dtype, weight.device) == (
        model.weight.shape,
        model.weight.dtype,
        model.weight.device,
    )


def test_shared_storages_stay_shared() -> None:
    loaded = weightless_pickle.loads(weightless_pickle.dumps(Tied()))
    storages = [each.untyped_storage().data_ptr() for each in (loaded.first, loaded.second)]
    assert storages[0] == storages[1]
    assert loaded.second.data_ptr() - loaded.first.data_ptr() == 4 * LARGE


def test_small_tensors_are_pickled_with_their_contents_and_strides() -> None:
    model = Tied()
    loaded = weightless_pickle.loads(weightless_pickle.dumps(model))
    assert torch.equal(loaded.scale, model.scale)
    assert loaded.scale.stride() == model.scale.stride()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16])
def test_the_limit_is_on_bytes(dtype: torch.dtype) -> None:
    largest = 2**16 // dtype.itemsize
    small, large = torch.ones(largest, dtype=dtype), torch.ones(largest + 1, dtype=dtype)
    with_content, without = (weightless_pickle.dumps(tensor) for tensor in (small, large))
    assert len(without) < 10_000 < len(with_content)
    assert torch.equal(weightless_pickle.loads(with_content), small)
    loaded = weightless_pickle.loads(without)
    assert (loaded.shape, loaded.dtype) == (large.shape, large.dtype)


def test_a_subclass_is_pickled_whole() -> None:
    tagged = torch.ones(LARGE).as_subclass(Tagged)
    loaded = weightless_pickle.loads(weightless_pickle.dumps(tagged))
    assert type(loaded) is Tagged
    assert torch.equal(loaded, tagged)


def test_events_and_streams_become_none() -> None:
    assert weightless_pickle.loads(weightless_pickle.dumps([torch.Stream("cpu"), 1])) == [None, 1]


def test_what_does_not_pickle_is_an_error() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        weightless_pickle.dumps(lambda: None)
