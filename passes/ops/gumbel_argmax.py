"""The greatest score of each chunk of a row, with noise of a pure function or without: the large half of choosing a token.

Choosing among a hundred thousand scores is a reduction that ought to take as long as reading them. A program takes one chunk of
one row; what remains is small.

The noise is Gumbel's, -log(-log(u)), so that the greatest of `score / temperature + noise` is a draw from the softmax. Its bits
are lowbias32 of the row's key and the place (C. Wellons, 2018, "Prospecting for Hash Functions"), int32 arithmetic that wraps.

A chunk that holds NaN has a maximum that is not finite.

Shapes: S rows, V scores each, in C chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from passes.ops.library import define_op
from passes.ops.pdl import pdl_launch_options

CHUNK = 4096
FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)


def lowbias32(x: Tensor) -> Tensor:
    """lowbias32 of int32; shifts bring in zeros."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FACTORS[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * FACTORS[1]
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel_noise(key_S: Tensor, num_places: int) -> Tensor:
    """Noise [S, places], float32, of int32 keys."""
    bits = lowbias32(
        key_S[:, None]
        ^ lowbias32(torch.arange(num_places, device=key_S.device, dtype=torch.int32))[None]
    )
    # Large noise comes from small numbers, where float32 is precise; 1 itself, to which large ones round, would give -inf.
    uniform = (((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def add_gumbel_noise(
    scores_SV: Tensor, temperature_S: Tensor | None, key_S: Tensor | None
) -> Tensor:
    """`scores / temperature + noise`, float32; the scores themselves in rows whose temperature is 0, and without temperatures."""
    scores_SV = scores_SV.float()
    if temperature_S is None or key_S is None:
        return scores_SV
    drawn = scores_SV / temperature_S.clamp(min=1e-6)[:, None] + gumbel_noise(
        key_S, scores_SV.shape[1]
    )
    return torch.where(temperature_S[:, None] > 0, drawn, scores_SV)


def gumbel_argmax_reference(
    scores_SV: Tensor, temperature_S: Tensor | None, key_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch."""
    noisy_SV = add_gumbel_noise(scores_SV, temperature_S, key_S)
    S, V = noisy_SV.shape
    chunks = triton.cdiv(V, CHUNK)
    padded = torch.nn.functional.pad(noisy_SV, (0, chunks * CHUNK - V), value=float("-inf")).view(
        S, chunks, CHUNK
    )
    best_SC, place_SC = padded.max(-1)
    return best_SC, place_SC + torch.arange(chunks, device=place_SC.device) * CHUNK


@triton.jit
def _lowbias32(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel_argmax_kernel(  # type: ignore[no-untyped-def]
    best, place, scores, temperature, key, stride_s, stride_v, V, DRAWS: tl.constexpr, USE_PDL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    score = tl.load(
        scores + row.to(tl.int64) * stride_s + v * stride_v, mask=v < V, other=float("-inf")
    ).to(tl.float32)
    score = tl.where(score == score, score, float("inf"))  # a maximum would drop NaN
    if DRAWS:
        heat = tl.load(temperature + row)
        if heat > 0.0:
            bits = _lowbias32(tl.load(key + row).to(tl.uint32) ^ _lowbias32(v.to(tl.uint32)))
            uniform = tl.minimum(
                ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * (1.0 / 2147483648.0),
                1.0 - 1.0 / 16777216.0,
            )
            # -log(1 - u), by its series where that is more precise.
            series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
            score = score / tl.maximum(heat, 1e-6) - tl.log(
                tl.where(uniform < 1.0 / 64.0, series, -tl.log(1.0 - uniform))
            )
    greatest, at = tl.max(score, 0, return_indices=True)
    out = row * tl.num_programs(1) + chunk
    tl.store(best + out, greatest)
    tl.store(place + out, tl.minimum(chunk * CHUNK + at, V - 1).to(tl.int64))


def gumbel_argmax_kernel(
    scores_SV: Tensor, temperature_S: Tensor | None, key_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Triton; scores may have any strides."""
    assert temperature_S is None or temperature_S.is_contiguous()
    assert key_S is None or key_S.is_contiguous()
    best_SC, place_SC = _gumbel_argmax_fake(scores_SV, temperature_S, key_S)
    _gumbel_argmax_kernel[best_SC.shape](
        best_SC, place_SC, scores_SV, temperature_S, key_S, *scores_SV.stride(), scores_SV.shape[1],
        DRAWS=temperature_S is not None, CHUNK=CHUNK, num_warps=8, **pdl_launch_options(),
    )  # fmt: skip
    return best_SC, place_SC


def _gumbel_argmax_fake(
    scores_SV: Tensor, temperature_S: Tensor | None, key_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (scores_SV.shape[0], triton.cdiv(scores_SV.shape[1], CHUNK))
    return scores_SV.new_empty(shape, dtype=torch.float32), scores_SV.new_empty(
        shape, dtype=torch.int64
    )


gumbel_argmax = define_op(
    "gumbel_argmax(Tensor scores, Tensor? temperature, Tensor? key) -> (Tensor, Tensor)",
    reference=gumbel_argmax_reference,
    kernel=gumbel_argmax_kernel,
    fake=_gumbel_argmax_fake,
)
