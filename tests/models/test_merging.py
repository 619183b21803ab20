"""Weights side by side: which, where, and for how long."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compiled_llm import CompiledLLM
from compiled_llm.models.merging import count_merged, linears_by_input, merged
from tests.tiny import Reference, greedy, prompt_of, small_config, tiny_model

CONFIG = {"buckets": {"decode": [4], "prefill": [48], "samplers": ["greedy"]}}


class Block(nn.Module):
    """Three layers of one input, a fourth with a bias, and one whose weight another shares."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, n, bias=False) for n in (4, 6, 2))
        self.biased, self.tied = nn.Linear(8, 4), nn.Linear(8, 5, bias=False)
        self.table = nn.Embedding(5, 8)
        self.table.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in (self.a, self.b, self.biased, self.tied)], -1) + self.c(x + 1).sum()


def test_layers_of_one_input_are_found_and_merged() -> None:
    block, x = Block(), torch.randn(3, 8)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    with linears_by_input(block) as groups:
        expected = block(x)
    assert groups == [[block.a, block.b]], "c has another input, one has a bias, one is tied"
    assert count_merged(block) == 0
    with merged(block, groups):
        assert count_merged(block) == 1
        assert block.b.weight.data_ptr() == block.a.weight.data_ptr() + block.a.weight.numel() * 4
        assert torch.equal(block(x), expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


def test_weights_do_not_move_under_another_engine() -> None:
    model = tiny_model("llama")
    reference, prompt = Reference(model), prompt_of(20)
    with CompiledLLM(model, None, small_config(**CONFIG, passes={"merge_projections": False}), progress=False) as first:
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        with CompiledLLM(model, None, small_config(**CONFIG), progress=False) as second:
            assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
            assert greedy(first, [prompt], 8) == greedy(second, [prompt], 8) == [reference(prompt, 8)]
            merges = [p for bucket in second.report().buckets for p in bucket.passes if p.name == "merge_projections"]
            assert not any(merge.matches for merge in merges)
    with CompiledLLM(model, None, small_config(**CONFIG), progress=False) as alone:
        assert count_merged(model) == 4
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        with CompiledLLM(model, None, small_config(**CONFIG), progress=False) as second:
            assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
            assert greedy(alone, [prompt], 8) == greedy(second, [prompt], 8) == [reference(prompt, 8)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_merged_model_can_be_saved(family: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model(family)
    with CompiledLLM(model, None, small_config(**CONFIG), progress=False):
        assert count_merged(model) == 4
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.cpu()), name
