"""The C++ kernels, compiled when the first of them is called, with the compiler and the flags that Inductor uses."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from passes.ops.cpu.vector_isa import VectorISA, vector_isa

_SOURCES = ("vectors.cpp", "skinny_linear.cpp", "decode_attention.cpp", "prefill_attention.cpp")


def decode_attention(
    q_SHD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, seq_lens_S: Tensor,
    sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """As `passes.ops.decode_attention`."""
    kernel, options = (
        _library(vector_isa()).decode_attention,
        (sinks_H, slopes_H, scale, window, softcap),
    )
    return _attend(
        kernel, q_SHD, k_cache_PBGD, v_cache_PBGE, block_table_SN, (seq_lens_S,), *options
    )


def prefill_attention(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, query_start: Tensor, seq_lens_S: Tensor,
    sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """As `passes.ops.prefill_attention`."""
    kernel, options = (
        _library(vector_isa()).prefill_attention,
        (sinks_H, slopes_H, scale, window, softcap),
    )
    return _attend(
        kernel,
        q_THD,
        k_cache_PBGD,
        v_cache_PBGE,
        block_table_SN,
        (query_start, seq_lens_S),
        *options,
    )


def _attend(
    kernel: Any, q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor, lengths: tuple[Tensor, ...],
    sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """What both kernels take; `lengths` is what each wants to know of them."""
    q_THD = q_THD if q_THD.stride(-1) == 1 else q_THD.contiguous()
    assert block_table_SN.stride(1) == 1
    assert all(tensor.is_contiguous() for tensor in lengths)
    T, H, D = q_THD.shape
    _, page, G, E = v_cache_PBGE.shape
    out_THE = q_THD.new_zeros(T, H, E)
    kernel(
        q_THD.data_ptr(), q_THD.stride(0), q_THD.stride(1), k_cache_PBGD.data_ptr(), v_cache_PBGE.data_ptr(),
        block_table_SN.data_ptr(), block_table_SN.stride(0), *(tensor.data_ptr() for tensor in lengths),
        *(None if values is None else values.data_ptr() for values in (sinks_H, slopes_H)),
        out_THE.data_ptr(), len(block_table_SN), H, G, D, E, page, scale, window, softcap,
    )  # fmt: skip
    return out_THE


def skinny_linear(
    x_TK: Tensor,
    weight: Tensor,
    norm_K: Tensor | None,
    eps: float,
    residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:
    """As `passes.ops.skinny_linear`; the last dim of x and residual and the whole weight and norm are contiguous."""
    x_stride, feature_stride = x_TK.stride()
    assert feature_stride == 1
    assert weight.is_contiguous()
    residual = norm = None
    residual_stride = 0
    if norm_K is not None:
        assert norm_K.is_contiguous()
        norm = norm_K.data_ptr()
    if residual_TN is not None:
        residual_stride, feature_stride = residual_TN.stride()
        assert feature_stride == 1
        residual = residual_TN.data_ptr()
    T, K = x_TK.shape
    N = weight.shape[0] // 2 if gated else weight.shape[0]
    out_TN = x_TK.new_empty(T, N)
    _library(vector_isa()).skinny_linear(
        x_TK.data_ptr(),
        x_stride,
        weight.data_ptr(),
        norm,
        eps,
        residual,
        residual_stride,
        gated,
        out_TN.data_ptr(),
        T,
        N,
        K,
    )
    return out_TN


@cache
def _library(isa: VectorISA) -> ctypes.CDLL:
    from torch._inductor.codecache import (
        CppCodeCache,  # with the compiler, which takes seconds to import
    )

    source = isa.source_prefix + "\n".join(
        (Path(__file__).parent / name).read_text() for name in _SOURCES
    )
    library = CppCodeCache.load(source)
    assert isinstance(library, ctypes.CDLL)
    pointer, number, real, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_bool
    library.decode_attention.argtypes = [
        pointer, number, number, pointer, pointer, pointer, number, pointer, pointer, pointer,
        pointer, number, number, number, number, number, number, real, number, real,
    ]  # fmt: skip
    library.prefill_attention.argtypes = [
        pointer, number, number, pointer, pointer, pointer, number, pointer, pointer, pointer, pointer,
        pointer, number, number, number, number, number, number, real, number, real,
    ]  # fmt: skip
    library.skinny_linear.argtypes = [
        pointer, number, pointer, pointer, real, pointer, number, flag, pointer, number, number, number
    ]  # fmt: skip
    return library
