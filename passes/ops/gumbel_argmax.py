"""Argmax of each chunk of a row of scores, with or without Gumbel noise: the bulk of sampling.

A program reduces one chunk of one row, so that a row of 100,000 scores is read by many programs
in parallel. The caller takes the argmax of the chunks' maxima.

The argmax of `score / temperature + noise`, with noise -log(-log(u)), is a sample of the softmax
(Gumbel-max trick; see Maddison et al., arXiv:1411.0030). Noise
is a pure function of a row's key and a token id: u is made of the bits of lowbias32 (C. Wellons,
2018, "Prospecting for Hash Functions"), an integer hash in wrapping int32 arithmetic.

The maximum of a chunk that holds NaN is not finite.

Shape suffixes:
    S: rows
    V: scores of a row
    C: chunks of a row, `CHUNK` scores each
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from passes.ops.library import define_op
from passes.ops.pdl import pdl_launch_options

CHUNK = 4096
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # of lowbias32, as int32


def lowbias32(x: Tensor) -> Tensor:
    """Return the lowbias32 hash of each int32 element."""
    # Right shifts of int32 copy the sign bit; the masks make them logical.
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MULTIPLIERS[1]
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel_noise(key_S: Tensor, num_scores: int) -> Tensor:
    """Return float32 noise [S, num_scores] for int32 keys [S]."""
    ids_V = torch.arange(num_scores, device=key_S.device, dtype=torch.int32)
    bits = lowbias32(key_S[:, None] ^ lowbias32(ids_V)[None])
    # Large noise comes from small u, where float32 is precise. u = 1, to which the largest values
    # round, would give -inf.
    uniform = (((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def add_gumbel_noise(
    scores_SV: Tensor, temperature_S: Tensor | None, key_S: Tensor | None
) -> Tensor:
    """Return `scores / temperature + noise` in float32.

    Rows whose temperature is 0, and all rows without temperatures, are returned unchanged.
    """
    scores_SV = scores_SV.float()
    if temperature_S is None or key_S is None:
        return scores_SV
    noise_SV = gumbel_noise(key_S, scores_SV.shape[1])
    noisy_SV = scores_SV / temperature_S.clamp(min=1e-6)[:, None] + noise_SV
    return torch.where(temperature_S[:, None] > 0, noisy_SV, scores_SV)


def gumbel_argmax_reference(
    scores_SV: Tensor, temperature_S: Tensor | None, key_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return maxima [S, C] float32 and their ids [S, C] int64, in plain PyTorch.

    Args:
        scores_SV: float32, float16 or bfloat16.
        temperature_S: float32, 0 for rows without noise; None for no noise at all.
        key_S: int32 keys of the noise; None if there are no temperatures.
    """
    noisy_SV = add_gumbel_noise(scores_SV, temperature_S, key_S)
    S, V = noisy_SV.shape
    chunks = triton.cdiv(V, CHUNK)
    padded_SV = torch.nn.functional.pad(noisy_SV, (0, chunks * CHUNK - V), value=float("-inf"))
    max_SC, index_SC = padded_SV.view(S, chunks, CHUNK).max(-1)
    return max_SC, index_SC + torch.arange(chunks, device=index_SC.device) * CHUNK


@triton.jit
def _lowbias32(x):  # type: ignore[no-untyped-def]
    """Return lowbias32 of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel_argmax_kernel(  # type: ignore[no-untyped-def]
    max_out, id_out, scores, temperatures, keys, stride_s, stride_v, V,
    HAS_NOISE: tl.constexpr, USE_PDL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Reduce one chunk of one row; the grid is [S, C]."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    score = tl.load(
        scores + row.to(tl.int64) * stride_s + v * stride_v, mask=v < V, other=float("-inf")
    ).to(tl.float32)
    score = tl.where(score == score, score, float("inf"))  # tl.max would ignore NaN
    if HAS_NOISE:
        temperature = tl.load(temperatures + row)
        if temperature > 0.0:
            bits = _lowbias32(tl.load(keys + row).to(tl.uint32) ^ _lowbias32(v.to(tl.uint32)))
            uniform = tl.minimum(
                ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * (1.0 / 2147483648.0),
                1.0 - 1.0 / 16777216.0,
            )
            # -log(1 - u): for small u by its series, which is more precise there.
            series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
            score = score / tl.maximum(temperature, 1e-6) - tl.log(
                tl.where(uniform < 1.0 / 64.0, series, -tl.log(1.0 - uniform))
            )
    maximum, index = tl.max(score, 0, return_indices=True)
    out = row * tl.num_programs(1) + chunk
    tl.store(max_out + out, maximum)
    tl.store(id_out + out, tl.minimum(chunk * CHUNK + index, V - 1).to(tl.int64))


def gumbel_argmax_kernel(
    scores_SV: Tensor, temperature_S: Tensor | None, key_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, with Triton; scores may have any strides."""
    assert temperature_S is None or temperature_S.is_contiguous()
    assert key_S is None or key_S.is_contiguous()
    max_SC, id_SC = _gumbel_argmax_fake(scores_SV, temperature_S, key_S)
    _gumbel_argmax_kernel[max_SC.shape](
        max_SC, id_SC, scores_SV, temperature_S, key_S, *scores_SV.stride(), scores_SV.shape[1],
        HAS_NOISE=temperature_S is not None, CHUNK=CHUNK, num_warps=8, **pdl_launch_options(),
    )  # fmt: skip
    return max_SC, id_SC


def _gumbel_argmax_fake(
    scores_SV: Tensor, temperature_S: Tensor | None, key_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (scores_SV.shape[0], triton.cdiv(scores_SV.shape[1], CHUNK))
    max_SC = scores_SV.new_empty(shape, dtype=torch.float32)
    id_SC = scores_SV.new_empty(shape, dtype=torch.int64)
    return max_SC, id_SC


gumbel_argmax = define_op(
    "gumbel_argmax(Tensor scores, Tensor? temperature, Tensor? key) -> (Tensor, Tensor)",
    reference=gumbel_argmax_reference,
    kernel=gumbel_argmax_kernel,
    fake=_gumbel_argmax_fake,
)
