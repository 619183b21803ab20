"""What is found to be the same in every layer, and what is not."""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from passes import PassContext
from passes.hoist_step_invariants import HOIST_STEP_INVARIANTS, MIN_READERS
from passes.ops.materialize import materialize

CONTEXT = PassContext(num_tokens=3)


def step(angles: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    hidden = functional.embedding(tokens, weight)
    rare, often, of_hidden = angles.cos(), angles.sin(), hidden.exp()
    for _ in range(MIN_READERS):
        hidden = hidden @ weight * often[:, None] + of_hidden
    return hidden * rare[:, None]


def test_what_every_layer_reads_is_kept() -> None:
    inputs = torch.randn(3), torch.arange(3), torch.randn(4, 4)
    module = make_fx(step, tracing_mode="fake")(*inputs)
    labels = HOIST_STEP_INVARIANTS.run(module.graph, CONTEXT)
    module.graph.lint()
    module.recompile()
    values = module.graph.find_nodes(op="call_function", target=materialize)
    assert [value.args[0].target for value in values] == [torch.ops.aten.sin.default], (
        "the cosine has one reader, the rest is of tokens"
    )
    assert labels == [values[0].args[0].name]
    torch.testing.assert_close(module(*inputs), step(*inputs))
