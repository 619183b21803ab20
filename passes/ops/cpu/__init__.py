"""C++ kernels for float32 on a CPU, compiled at the first call.

They are compiled with the compiler and flags of Inductor's CPU backend, once per process and
instruction set, and called through ctypes.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from passes.ops.cpu.vector_isa import VectorISA, vector_isa
from passes.torch_internals import CPP_CODE_CACHE

# Concatenated into one source; vectors.cpp defines what the others use.
_SOURCES = ("vectors.cpp", "skinny_linear.cpp", "decode_attention.cpp", "prefill_attention.cpp")


def decode_attention(
    q_SHD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor,
    seq_lens_S: Tensor, sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    """Return what `passes.ops.decode_attention` returns; all floating-point tensors are float32."""
    return _attend(
        _library(vector_isa()).decode_attention, q_SHD, k_cache_PBGD, v_cache_PBGE, block_table_SN,
        (seq_lens_S,), sinks_H, slopes_H, scale, window, softcap,
    )  # fmt: skip


def prefill_attention(
    q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor,
    query_start: Tensor, seq_lens_S: Tensor, sinks_H: Tensor | None, slopes_H: Tensor | None,
    scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Return what `passes.ops.prefill_attention` returns; floating-point tensors are float32."""
    return _attend(
        _library(vector_isa()).prefill_attention, q_THD, k_cache_PBGD, v_cache_PBGE, block_table_SN,
        (query_start, seq_lens_S), sinks_H, slopes_H, scale, window, softcap,
    )  # fmt: skip


def _attend(
    kernel: Any, q_THD: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, block_table_SN: Tensor,
    lengths: tuple[Tensor, ...], sinks_H: Tensor | None, slopes_H: Tensor | None, scale: float,
    window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Call an attention kernel; `lengths` are its int32 tensors besides the block table."""
    q_THD = q_THD if q_THD.stride(-1) == 1 else q_THD.contiguous()
    assert block_table_SN.stride(1) == 1
    assert all(tensor.is_contiguous() for tensor in lengths)
    T, H, D = q_THD.shape
    _, page_size, G, E = v_cache_PBGE.shape
    out_THE = q_THD.new_zeros(T, H, E)
    kernel(
        q_THD.data_ptr(), q_THD.stride(0), q_THD.stride(1),
        k_cache_PBGD.data_ptr(), v_cache_PBGE.data_ptr(),
        block_table_SN.data_ptr(), block_table_SN.stride(0),
        *(tensor.data_ptr() for tensor in lengths),
        *(None if values is None else values.data_ptr() for values in (sinks_H, slopes_H)),
        out_THE.data_ptr(), len(block_table_SN), H, G, D, E, page_size, scale, window, softcap,
    )  # fmt: skip
    return out_THE


def skinny_linear(
    x_TK: Tensor, weight: Tensor, norm_K: Tensor | None, eps: float, residual_TN: Tensor | None,
    gated: bool,
) -> Tensor:  # fmt: skip
    """Return what `passes.ops.skinny_linear` returns.

    All tensors are float32. Weight and norm, and the last dimension of x and residual, are
    contiguous.
    """
    x_stride, feature_stride = x_TK.stride()
    assert feature_stride == 1
    assert weight.is_contiguous()
    norm = residual = None
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
        x_TK.data_ptr(), x_stride, weight.data_ptr(), norm, eps, residual, residual_stride, gated,
        out_TN.data_ptr(), T, N, K,
    )  # fmt: skip
    return out_TN


@cache
def _library(isa: VectorISA) -> ctypes.CDLL:
    """Compile the kernels for an instruction set, or load them from Inductor's cache."""
    folder = Path(__file__).parent
    source = isa.source_prefix + "\n".join((folder / name).read_text() for name in _SOURCES)
    library = CPP_CODE_CACHE.get().load(source)
    assert isinstance(library, ctypes.CDLL)
    for name, argtypes in _ARGTYPES.items():
        getattr(library, name).argtypes = argtypes
    return library


_pointer, _long, _float, _bool = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_bool
_ARGTYPES: dict[str, list[Any]] = {
    "decode_attention": [
        _pointer, _long, _long, _pointer, _pointer, _pointer, _long, _pointer, _pointer, _pointer,
        _pointer, _long, _long, _long, _long, _long, _long, _float, _long, _float,
    ],
    "prefill_attention": [
        _pointer, _long, _long, _pointer, _pointer, _pointer, _long, _pointer, _pointer, _pointer,
        _pointer, _pointer, _long, _long, _long, _long, _long, _long, _float, _long, _float,
    ],
    "skinny_linear": [
        _pointer, _long, _pointer, _pointer, _float, _pointer, _long, _bool, _pointer, _long,
        _long, _long,
    ],
}  # fmt: skip
