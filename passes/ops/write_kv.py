"""Write the keys and values of a step's tokens to their slots in the paged KV cache.

Shape suffixes:
    T: tokens
    G: key/value heads
    D: key head dim
    E: value head dim
    P: pages of the cache
    B: tokens per page

The slot of a token is `page * B + offset`. Page 0 is reserved for padding: the slots of padded
tokens lie in it, and several tokens may have the same one.
"""

import triton
import triton.language as tl
from torch import Tensor

from passes.ops.library import define_op


def write_kv_reference(
    k_TGD: Tensor, v_TGE: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, slots_T: Tensor
) -> None:
    """Write both caches in place, in plain PyTorch; `slots_T` is int64."""
    k_cache_PBGD.view(-1, *k_cache_PBGD.shape[2:])[slots_T] = k_TGD
    v_cache_PBGE.view(-1, *v_cache_PBGE.shape[2:])[slots_T] = v_TGE


@triton.jit
def _write_kv_kernel(  # type: ignore[no-untyped-def]
    k, v, k_cache, v_cache, slots,
    k_stride_t, k_stride_g, k_stride_d, v_stride_t, v_stride_g, v_stride_e,
    D: tl.constexpr, E: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one head of one token; the grid is [T, G]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token)
    lane = tl.arange(0, BLOCK)
    key = tl.load(k + token * k_stride_t + head * k_stride_g + lane * k_stride_d, mask=lane < D)
    tl.store(k_cache + (slot * G + head) * D + lane, key, mask=lane < D)
    value = tl.load(v + token * v_stride_t + head * v_stride_g + lane * v_stride_e, mask=lane < E)
    tl.store(v_cache + (slot * G + head) * E + lane, value, mask=lane < E)


def write_kv_kernel(
    k_TGD: Tensor, v_TGE: Tensor, k_cache_PBGD: Tensor, v_cache_PBGE: Tensor, slots_T: Tensor
) -> None:
    """Write both caches in place with Triton.

    k and v may have any strides; caches and `slots_T` (int64) are contiguous.
    """
    T, G, D = k_TGD.shape
    E = v_TGE.shape[-1]
    assert slots_T.is_contiguous()
    _write_kv_kernel[(T, G)](
        k_TGD, v_TGE, k_cache_PBGD, v_cache_PBGE, slots_T, *k_TGD.stride(), *v_TGE.stride(),
        D=D, E=E, G=G, BLOCK=triton.next_power_of_2(max(D, E)), num_warps=1,
    )  # fmt: skip


def _write_kv_fake(*_: Tensor) -> None:
    return None


write_kv = define_op(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    reference=write_kv_reference,
    kernel=write_kv_kernel,
    fake=_write_kv_fake,
)
