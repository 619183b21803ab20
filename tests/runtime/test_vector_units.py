"""What the C++ that Inductor writes may not do."""

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_cpp_code

from compiled_llm.runtime.vector_units import sums_stay_in_bounds
from tests.conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="of C++")


def _sums(heads: Tensor, features: Tensor) -> Tensor:
    """As in the scan of mamba2: [T, S, H] and [S, H, D] -> [T, H, D]."""
    return (heads[:, :, :, None] * features[None]).sum(1)


@pytest.mark.parametrize("num_heads", [3, 16, 24])
def test_sums_of_any_number_of_heads_are_right(num_heads: int) -> None:
    torch.manual_seed(0)
    heads, features = torch.randn(5, 16, num_heads), torch.randn(16, 16, num_heads).transpose(1, 2)
    with sums_stay_in_bounds():
        torch._dynamo.reset()
        actual, code = run_and_get_cpp_code(torch.compile(_sums), heads, features)
    torch.testing.assert_close(actual, _sums(heads, features))
    assert ("Vectorized" in code) == (num_heads == 16), "one whole vector of 16 on any machine, or two or four"
