"""Step invariants: which values are materialized, and which are not."""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from passes import PassContext
from passes.hoist_step_invariants import HOIST_STEP_INVARIANTS, MIN_READERS
from passes.ops.materialize import materialize

aten = torch.ops.aten


def step(angles: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    """Read the sine in each of `MIN_READERS` layers, the cosine once."""
    hidden = functional.embedding(tokens, weight)
    cosine, sine, of_hidden = angles.cos(), angles.sin(), hidden.exp()
    for _ in range(MIN_READERS):
        hidden = hidden @ weight * sine[:, None] + of_hidden
    return hidden * cosine[:, None]


def test_values_read_by_every_layer_are_materialized() -> None:
    inputs = torch.randn(3), torch.arange(3), torch.randn(4, 4)
    module = make_fx(step, tracing_mode="fake")(*inputs)
    labels = HOIST_STEP_INVARIANTS.run(module.graph, PassContext(num_tokens=3))
    module.graph.lint()
    module.recompile()
    buffers = module.graph.find_nodes(op="call_function", target=materialize)
    sources = [buffer.args[0] for buffer in buffers]
    # The cosine has one reader; exp(hidden) depends on tokens.
    assert [source.target for source in sources] == [aten.sin.default]
    assert labels == [sources[0].name]
    assert list(sources[0].users) == buffers, "all readers read the buffer"
    torch.testing.assert_close(module(*inputs), step(*inputs))
