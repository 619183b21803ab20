"""The C++ kernels, compiled when the first of them is called, with the compiler and the flags that Inductor uses."""

import ctypes
from functools import cache
from pathlib import Path

from torch import Tensor


def decode_attention(
    q_SHD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, seq_lens_S: Tensor,
    sinks_H: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """As `passes.ops.decode_attention`; the last dim of q is contiguous."""
    assert q_SHD.stride(2) == 1
    assert block_table_SN.stride(1) == 1
    assert seq_lens_S.is_contiguous()
    S, H, D = q_SHD.shape
    _, page, G, E = v_cache_PBGE.shape
    out_SHE = q_SHD.new_empty(S, H, E)
    _library().decode_attention(
        _address(q_SHD), _long(q_SHD.stride(0)), _long(q_SHD.stride(1)), _address(k_cache_PBGD), _address(v_cache_PBGE),
        _address(block_table_SN), _long(block_table_SN.stride(0)), _address(seq_lens_S), _address(sinks_H), _address(out_SHE),
        *map(_long, (S, H, G, D, E, page)), ctypes.c_float(scale), _long(window), ctypes.c_float(softcap),
    )  # fmt: skip
    return out_SHE


def small_linear(x_TK: Tensor, weight_NK: Tensor, residual_TN: Tensor | None) -> Tensor:
    """As `passes.ops.small_linear`, without norm and gate; the last dim of x and residual and the whole weight are contiguous."""
    assert x_TK.stride(1) == 1
    assert weight_NK.is_contiguous()
    assert residual_TN is None or residual_TN.stride(1) == 1
    T, K = x_TK.shape
    N = weight_NK.shape[0]
    out_TN = x_TK.new_empty(T, N)
    _library().small_linear(
        _address(x_TK), _long(x_TK.stride(0)), _address(weight_NK), _address(residual_TN),
        _long(0 if residual_TN is None else residual_TN.stride(0)), _address(out_TN), *map(_long, (T, N, K)),
    )  # fmt: skip
    return out_TN


@cache
def _library() -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache  # with the compiler, which takes seconds to import

    library = CppCodeCache.load((Path(__file__).parent / "kernels.cpp").read_text(), extra_flags=["-ffp-contract=fast"])
    assert isinstance(library, ctypes.CDLL)
    return library


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


_long = ctypes.c_long
