"""The op that makes Inductor write a value to a buffer."""

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from passes.ops.materialize import materialize, register_materialize_lowering


def layers(angles: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Read the sine in two kernels of different sizes."""
    sine = materialize(angles.sin())
    return x * sine, (y @ y) * sine[:, None]


def test_inductor_computes_the_value_once() -> None:
    register_materialize_lowering()
    # A multiple of all vector widths, so that no kernel has a scalar loop for the rest.
    inputs = torch.randn(16), torch.randn(5, 16), torch.randn(16, 16)
    compiled = torch.compile(layers, fullgraph=True, options={"fx_graph_cache": False})
    actual, codes = run_and_get_code(compiled, *inputs)
    torch.testing.assert_close(actual, layers(*inputs))
    (code,) = codes
    assert "materialize.default(" not in code, "the op is lowered, not called"
    assert code.count("sin(") == 1, "another kernel computes the value again"


def test_reference_returns_a_copy() -> None:
    x = torch.randn(3)
    y = materialize(x)
    assert torch.equal(x, y)
    assert x.data_ptr() != y.data_ptr()
