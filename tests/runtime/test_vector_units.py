"""What the C++ that Inductor writes may not do."""

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.cpu_vec_isa import valid_vec_isa_list
from torch._inductor.utils import run_and_get_cpp_code

from compiled_llm.runtime.vector_units import remembered, sums_stay_in_bounds
from tests.conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="of C++")


def _sums(heads: Tensor, features: Tensor) -> Tensor:
    """As in the scan of mamba2: [T, S, H] and [S, H, D] -> [T, H, D]."""
    return (heads[:, :, :, None] * features[None]).sum(1)


@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("num_heads", [3, 16, 24])
def test_sums_of_any_number_of_heads_are_right(num_heads: int, bits: int) -> None:
    """With each size of vectors that Inductor can use here: whole vectors of heads are vectorized, and no others."""
    with remembered():
        if bits not in {isa.bit_width() for isa in valid_vec_isa_list()}:
            pytest.skip(f"no vectors of {bits} bits")
        torch.manual_seed(0)
        heads, features = torch.randn(5, 16, num_heads), torch.randn(16, 16, num_heads).transpose(1, 2)
        with sums_stay_in_bounds(), inductor_config.patch({"cpp.simdlen": bits, "fx_graph_cache": False}):
            torch._dynamo.reset()
            actual, code = run_and_get_cpp_code(torch.compile(_sums), heads, features)
    torch.testing.assert_close(actual, _sums(heads, features))
    assert ("Vectorized" in code) == (num_heads % (bits // 32) == 0)
