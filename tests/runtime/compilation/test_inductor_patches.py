"""The patches of Inductor's C++ code generation."""

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.cpu_vec_isa import valid_vec_isa_list
from torch._inductor.utils import run_and_get_cpp_code

from compiled_llm import CompiledLLM
from compiled_llm.runtime.compilation.inductor_patches import (
    CACHE_TAG,
    cached_vec_isa_checks,
    safe_reduction_tiling,
)
from tests.conftest import DEVICE
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="C++ is generated for CPUs")


def _sums(heads: Tensor, features: Tensor) -> Tensor:
    """Compute sums as the scan of mamba2 does: [T, S, H] and [S, H, D] -> [T, H, D]."""
    return (heads[:, :, :, None] * features[None]).sum(1)


@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("num_heads", [3, 16, 24])
def test_sums_of_any_number_of_heads_are_right(num_heads: int, bits: int) -> None:
    """For each vector width of this machine: whole vectors of heads are vectorized, others not."""
    with cached_vec_isa_checks():
        if bits not in {isa.bit_width() for isa in valid_vec_isa_list()}:
            pytest.skip(f"no vectors of {bits} bits")
        torch.manual_seed(0)
        heads, features = (
            torch.randn(5, 16, num_heads),
            torch.randn(16, 16, num_heads).transpose(1, 2),
        )
        with (
            safe_reduction_tiling(),
            inductor_config.patch({"cpp.simdlen": bits, "fx_graph_cache": False}),
        ):
            torch._dynamo.reset()
            actual, code = run_and_get_cpp_code(torch.compile(_sums), heads, features)
    torch.testing.assert_close(actual, _sums(heads, features))
    assert ("Vectorized" in code) == (num_heads % (bits // 32) == 0)


def test_generated_code_is_cached_by_vector_width() -> None:
    """Inductor's key does not hold the width: code for AVX-512 would be compiled for AVX2."""
    assert CACHE_TAG.endswith(torch.backends.cpu.get_cpu_capability())


def test_tokens_are_right_with_another_vector_width() -> None:
    """Also on a processor with AVX-512, whose instructions the compiler could use."""
    if not torch.cpu._is_avx2_supported():
        pytest.skip("no AVX2")
    model, prompt = tiny_model("llama"), prompt_of(30)
    config = small_config(
        compile={"options": {"cpp.simdlen": 256, "fx_graph_cache": False}},
    )
    with CompiledLLM(model, None, config, progress=False) as llm:
        assert greedy(llm, [prompt], 20) == [Reference(model)(prompt, 20)]
        assert not llm.report().fallbacks
