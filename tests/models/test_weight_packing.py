"""Tests of weight packing: which weights are packed, in which order, and for how long."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compiled_llm import CompiledLLM
from compiled_llm.models.weight_packing import find_packed_groups, linears_by_input, packed_weights
from passes import PassContext, Pipeline
from passes.merge_projections import MERGE_PROJECTIONS, PackedWeights
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

CONFIG = {"buckets": {"decode": [4], "prefill": [48], "samplers": ["greedy"]}}


class Block(nn.Module):
    """Three layers with one input, a fourth with a bias, and one with a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, n, bias=False) for n in (4, 6, 2))
        self.biased, self.tied = nn.Linear(8, 4), nn.Linear(8, 5, bias=False)
        self.table = nn.Embedding(5, 8)
        self.table.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            torch.cat([layer(x) for layer in (self.a, self.b, self.biased, self.tied)], -1)
            + self.c(x + 1).sum()
        )


def test_layers_with_one_input_are_packed() -> None:
    block, x = Block(), torch.randn(3, 8)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    with linears_by_input(block) as groups:
        expected = block(x)
    assert groups == [[block.a, block.b]], "c has another input, one has a bias, one is tied"
    assert find_packed_groups(block) == ()
    with packed_weights(block, groups):
        assert find_packed_groups(block) == (("a", "b"),)
        assert block.b.weight.data_ptr() == block.a.weight.data_ptr() + block.a.weight.numel() * 4
        assert torch.equal(block(x), expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


def _lay_out(storage: torch.Tensor, *layers: nn.Linear) -> None:
    """Put the weights of the layers into one storage, one after another."""
    begin = 0
    for layer in layers:
        weight = storage[begin : begin + layer.weight.numel()].view_as(layer.weight)
        layer.weight.data = weight.copy_(layer.weight.data)
        begin += weight.numel()


LAYOUTS = {
    "another order": lambda block: _lay_out(torch.empty(80), block.b, block.a),
    "a larger storage": lambda block: _lay_out(torch.empty(81), block.a, block.b),
    "something between": lambda block: _lay_out(torch.empty(96), block.a, block.c, block.b),
    "not from the beginning": lambda block: _lay_out(torch.empty(96), block.c, block.a, block.b),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_weights_in_another_layout_are_packed_again(layout: str) -> None:
    block, x = Block(), torch.randn(3, 8)
    LAYOUTS[layout](block)
    with linears_by_input(block) as groups:
        expected = block(x)
    with packed_weights(block, groups):
        assert find_packed_groups(block) == (("a", "b"),)
        assert [layer.weight.storage_offset() for layer in (block.a, block.b)] == [0, 32]
        assert torch.equal(block(x), expected)
        block.b.weight.data = block.b.weight.data.clone()
        assert find_packed_groups(block) == (), "weights are examined at each call"


@torch.no_grad()
def test_code_depends_on_the_order_of_packed_weights() -> None:
    """Inductor's cache key ignores offsets; code for one order would misread the other."""
    block, keys = Block(), []
    for order in ((block.a, block.b), (block.b, block.a)):
        _lay_out(torch.empty(80), *order)
        context = PassContext(num_tokens=1, facts=(PackedWeights(find_packed_groups(block)),))
        keys.append(Pipeline([MERGE_PROJECTIONS], context).uuid())
    assert keys[0] != keys[1]


def test_a_parameter_in_use_by_another_models_engine_is_not_moved() -> None:
    one, other = Block(), Block()
    other.a = one.a
    with packed_weights(one, []), packed_weights(other, [[other.a, other.b]]):
        assert find_packed_groups(other) == ()
    with packed_weights(other, [[other.a, other.b]]):
        assert find_packed_groups(other) == (("a", "b"),)


def test_weights_in_use_by_another_engine_are_not_moved() -> None:
    model = tiny_model("llama")
    reference, prompt = Reference(model), prompt_of(20)
    with CompiledLLM(
        model, None, small_config(**CONFIG, passes={"merge_projections": False}), progress=False
    ) as first:
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        with CompiledLLM(model, None, small_config(**CONFIG), progress=False) as second:
            assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
            assert (
                greedy(first, [prompt], 8) == greedy(second, [prompt], 8) == [reference(prompt, 8)]
            )
            merges = [
                p
                for bucket in second.report().buckets
                for p in bucket.passes
                if p.name == "merge_projections"
            ]
            assert not any(merge.matches for merge in merges)
    with CompiledLLM(model, None, small_config(**CONFIG), progress=False) as alone:
        assert len(find_packed_groups(model)) == 4
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        with CompiledLLM(model, None, small_config(**CONFIG), progress=False) as second:
            assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
            assert (
                greedy(alone, [prompt], 8) == greedy(second, [prompt], 8) == [reference(prompt, 8)]
            )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_packed_model_can_be_saved(family: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model(family)
    with CompiledLLM(model, None, small_config(**CONFIG), progress=False):
        assert len(find_packed_groups(model)) == 4
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.cpu()), name
