"""The rewrite of a rotary embedding's outer product, and products that must stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from passes import PassContext, PassError, Pipeline, RotaryEmbeddings
from passes.rotary_outer_product import ROTARY_OUTER_PRODUCT

aten = torch.ops.aten
Function = Callable[[Tensor, Tensor], Tensor]
CONTEXT = PassContext(num_tokens=3, facts=(RotaryEmbeddings(1),))


def batched(frequencies: Tensor, positions: Tensor) -> Tensor:
    """As transformers computes the angles."""
    return torch.bmm(frequencies[None, :, None], positions[None, None, :]).cos()


def unbatched(frequencies: Tensor, positions: Tensor) -> Tensor:
    return torch.mm(frequencies[:, None], positions[None, :]).sin()


def inner(frequencies: Tensor, positions: Tensor) -> Tensor:
    """A product whose inner dimension is not 1."""
    return torch.mm(frequencies[None, :], frequencies[:, None]) + positions


def _traced(function: Function) -> tuple[GraphModule, tuple[Tensor, Tensor]]:
    inputs = torch.rand(8), torch.arange(3.0)
    return make_fx(function, tracing_mode="fake")(*inputs), inputs


def _num_products(module: GraphModule) -> int:
    return sum(node.target in (aten.bmm.default, aten.mm.default) for node in module.graph.nodes)


@pytest.mark.parametrize("function", [batched, unbatched])
def test_outer_products_become_pointwise(function: Function) -> None:
    module, inputs = _traced(function)
    pipeline = Pipeline([ROTARY_OUTER_PRODUCT], CONTEXT)
    pipeline(module.graph)
    module.recompile()
    assert pipeline.reports[0].matches == 1
    assert _num_products(module) == 0
    assert len(module.graph.find_nodes(op="call_function", target=aten.mul.Tensor)) == 1
    assert torch.equal(module(*inputs), function(*inputs)), "each sum has one term"


def test_other_products_stay() -> None:
    module, inputs = _traced(inner)
    assert ROTARY_OUTER_PRODUCT.run(module.graph, CONTEXT) == []
    assert _num_products(module) == 1
    torch.testing.assert_close(module(*inputs), inner(*inputs))


def test_a_missing_embedding_is_an_error_except_for_one_token() -> None:
    """For one token, Inductor has decomposed the product before the pass."""
    module, _ = _traced(inner)
    with pytest.raises(PassError, match="it missed rotary embedding 0"):
        Pipeline([ROTARY_OUTER_PRODUCT], CONTEXT)(module.graph)
    context = PassContext(num_tokens=1, facts=(RotaryEmbeddings(1),))
    Pipeline([ROTARY_OUTER_PRODUCT], context)(module.graph)
