"""The sampler: logits to next ids, as a part of the graph.

Temperature sampling by the Gumbel-max trick: argmax(logits / temperature + noise), where the noise is a pure function of
(seed, position, token id). The same request so draws the same ids in any batch, bucket or order, and no generator state
exists to be captured. The hash is lowbias32 (C. Wellons, 2018, "Prospecting for Hash Functions"), in int64 arithmetic.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def sample(logits_SV: Tensor, temperature_S: Tensor, seed_S: Tensor, position_S: Tensor) -> Tensor:
    """Next ids [S] int64. Greedy where the temperature (float32) is 0; seeds and positions are int64."""
    logits_SV = logits_SV.float()
    noisy = logits_SV / temperature_S.clamp(min=1e-6)[:, None] + _gumbel(seed_S, position_S, logits_SV.shape[1])
    return _argmax(torch.where(temperature_S[:, None] > 0, noisy, logits_SV))


def _gumbel(seed_S: Tensor, position_S: Tensor, vocab_size: int) -> Tensor:
    row_S = _mix(_mix(_mix(seed_S) ^ (seed_S >> 32)) + position_S * 0x9E3779B1)
    bits_SV = _mix(row_S[:, None] ^ _mix(torch.arange(vocab_size, device=seed_S.device))[None])
    uniform = ((bits_SV >> 8).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _argmax(scores_SV: Tensor) -> Tensor:
    """First index of the maximum, in two stages: Inductor gives a whole-row argmax a single thread block."""
    S, V = scores_SV.shape
    chunks = next((n for n in range(1024, 15, -1) if V % n == 0), 1)
    best_SC, index_SC = scores_SV.view(S, chunks, V // chunks).max(-1)
    chunk_S1 = best_SC.argmax(-1, keepdim=True)
    return (chunk_S1 * (V // chunks) + index_SC.gather(1, chunk_S1)).squeeze(1)
