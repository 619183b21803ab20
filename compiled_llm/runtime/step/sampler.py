"""The samplers: logits to next token ids, as part of the graph.

Random sampling uses the Gumbel-max trick (Gumbel, 1954; Maddison et al., 2014, "A* Sampling",
arXiv:1411.0030): argmax(logits / temperature + noise) with Gumbel noise is a draw from the softmax.
The noise is a pure function of seed, position and token id (see `passes.ops.gumbel_argmax`).
The same request therefore gets the same tokens in any batch, bucket or order, and a graph captures
no generator state.

A row whose logits hold NaN or infinity, or in which every token is banned, has no next token: its
id is -1.

Shape suffixes: S sequences; V tokens in the vocabulary; C sampling parameters, or chunks of the
vocabulary; W bad words of up to L tokens each; R = L - 1 recent tokens.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passes.ops.gumbel_argmax import (
    add_gumbel_noise,
    gumbel_argmax,
    gumbel_argmax_reference,
    lowbias32,
)
from passes.ops.sampling_cutoff import sampling_cutoff

MAX_BAD_WORDS = 64
MAX_BAD_WORD_LEN = 8

# 2**32 divided by the golden ratio, as int32: successive positions give keys far apart (Knuth,
# The Art of Computer Programming, volume 3, section 6.4).
_GOLDEN_RATIO = 0x9E3779B1 - 2**32
_FLOAT_FIELDS = {
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
}
_BIASED = 1
_COUNTED = 2
_BAD_WORDS = 4
_HOST_SAMPLED = 8


class SamplingTensors(NamedTuple):
    """Sampling parameters of the rows, [S] each.

    They are int64, or float32 where `SamplingParams` has a float.

    logprobs: how many top logprobs are returned besides the sampled token's, -1 for none at all.
    flags: bits of what applies to the row: 1 its bias, 2 its token counts, 4 its bad words, 8 its
        tokens are sampled on the host, from logits that its logits processors changed.
    """

    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    logprobs: Any
    flags: Any

    @classmethod
    def unpack(cls, packed_SC: Tensor) -> "SamplingTensors":
        """Unpack int64 rows, in which a float is stored as the bits of a float64."""
        columns = zip(cls._fields, packed_SC.unbind(1), strict=True)
        return cls(
            *(
                column.view(torch.float64).float() if name in _FLOAT_FIELDS else column
                for name, column in columns
            )
        )

    @staticmethod
    def pack(
        *,
        seed: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logprobs: int = -1,
        biased: bool = False,
        counted: bool = False,
        bad_words: bool = False,
        host_sampled: bool = False,
    ) -> NDArray[np.int64]:
        """Pack the parameters of one row, [C] int64, in the order of the fields."""
        flags = _BIASED * biased + _COUNTED * counted
        flags += _BAD_WORDS * bad_words + _HOST_SAMPLED * host_sampled
        floats = np.array(
            [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty]
        ).view(np.int64)
        t, p, m, *penalties = floats.tolist()
        return np.array([seed, t, top_k, p, m, *penalties, logprobs, flags], np.int64)

    @property
    def counted(self) -> Any:
        """Whether the token counts apply, [S] bool."""
        return (self.flags & _COUNTED) > 0

    @property
    def host_sampled(self) -> Any:
        """Whether the host samples the row's tokens, [S] bool."""
        return (self.flags & _HOST_SAMPLED) > 0


class LogitsProcessorState(NamedTuple):
    """State of the rows that the `full` sampler reads besides the parameters; see `StepBuffers`.

    bias [S, V] float32; counts [S, V] int32; bad_words [S, W, L] int64; recent [S, R] int64.
    """

    bias: Tensor
    counts: Tensor
    bad_words: Tensor
    recent: Tensor


def sample_greedy(logits_SV: Tensor) -> Tensor:
    """Return the most likely ids [S] int64; the lowest of equally likely ones."""
    return _argmax(logits_SV)


def sample_random(
    logits_SV: Tensor, temperature_S: Tensor, seed_S: Tensor, position_S: Tensor
) -> Tensor:
    """Sample ids [S] int64 from softmax(logits / temperature).

    Rows of temperature 0 (float32) are greedy. Seeds and positions are int64.
    """
    return _argmax(logits_SV, temperature_S, _noise_key(seed_S, position_S))


def sample_full(
    logits_SV: Tensor, params: SamplingTensors, state: LogitsProcessorState, position_S: Tensor
) -> Tensor:
    """Sample ids [S] int64 with all of `SamplingParams`, in the order of transformers."""
    return _argmax(*_truncated_logits(logits_SV, params, state, position_S))


def perturbed_logits(
    logits_SV: Tensor,
    params: SamplingTensors,
    state: LogitsProcessorState,
    position_S: Tensor,
    *,
    slack_S: Tensor,
) -> Tensor:
    """Return the logits [S, V] float32 whose argmax is what `sample_full` samples, noise included.

    Tokens up to `slack_S` below the cutoff of top-k, top-p and min-p are kept.
    """
    return add_gumbel_noise(*_truncated_logits(logits_SV, params, state, position_S, slack_S))


def _truncated_logits(
    logits_SV: Tensor,
    params: SamplingTensors,
    state: LogitsProcessorState,
    position_S: Tensor,
    slack_S: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [S, V] to sample from, the temperature [S] of the draw and noise keys [S].

    The logits are already divided by the row's temperature, so the temperature of
    the draw is 1; it is 0 in greedy rows, which have no cutoff either.
    """
    processed_SV = process_logits(logits_SV.float(), params, state)
    scaled_SV = processed_SV / params.temperature.clamp(min=1e-6)[:, None]
    cutoff_S = sampling_cutoff(scaled_SV, params.top_k, params.top_p, params.min_p)
    cutoff_S = cutoff_S if slack_S is None else cutoff_S - slack_S
    # NaN is not below the cutoff and stays.
    kept_SV = torch.where(scaled_SV < cutoff_S[:, None], float("-inf"), scaled_SV)
    random_S = params.temperature > 0
    return (
        torch.where(random_S[:, None], kept_SV, processed_SV),
        random_S.float(),
        _noise_key(params.seed, position_S),
    )


def process_logits(
    logits_SV: Tensor, params: SamplingTensors, state: LogitsProcessorState
) -> Tensor:
    """Return float32 logits [S, V] after the bias, the penalties and the bad words.

    Repetition penalty: Keskar et al., 2019, arXiv:1909.05858, of prompt and output. Presence and
    frequency penalties: as in OpenAI's API, of the output alone.
    """
    biased_S1 = ((params.flags & _BIASED) > 0)[:, None]
    scores_SV = torch.where(biased_S1, logits_SV + state.bias, logits_SV)
    generated_SV = (state.counts >> 1).float()
    factor_S1 = params.repetition_penalty[:, None]
    repeated_SV = torch.where(scores_SV > 0, scores_SV / factor_S1, scores_SV * factor_S1)
    penalized_SV = torch.where(state.counts > 0, repeated_SV, scores_SV)
    penalized_SV = penalized_SV - params.frequency_penalty[:, None] * generated_SV
    penalized_SV = penalized_SV - params.presence_penalty[:, None] * (generated_SV > 0)
    scores_SV = torch.where(params.counted[:, None], penalized_SV, scores_SV)
    return scores_SV + _bad_words_mask(params, state, logits_SV.shape[1])


def _bad_words_mask(
    params: SamplingTensors, state: LogitsProcessorState, vocab_size: int
) -> Tensor:
    """Return -inf where a token would complete a bad word, else 0, [S, V] float32."""
    words_SWL, recent_S1R = state.bad_words, state.recent[:, None]
    prefix_SWR, last_SW = words_SWL[..., :-1], words_SWL[..., -1]
    begun_SW = ((prefix_SWR == recent_S1R) | (prefix_SWR < 0)).all(-1)
    begun_SW = begun_SW & (last_SW >= 0) & ((params.flags & _BAD_WORDS) > 0)[:, None]
    bans_SW = torch.zeros_like(begun_SW, dtype=torch.float32).masked_fill(begun_SW, float("-inf"))
    zeros_SV = torch.zeros(
        words_SWL.shape[0], vocab_size, dtype=torch.float32, device=words_SWL.device
    )
    return zeros_SV.scatter_add(1, last_SW.clamp(min=0), bans_SW)


def _noise_key(seed_S: Tensor, position_S: Tensor) -> Tensor:
    """Hash seed and position to the key of a row's noise, [S] int32."""
    seed_hash_S = lowbias32(lowbias32(seed_S.int()) ^ (seed_S >> 32).int())
    return lowbias32(seed_hash_S + position_S.int() * _GOLDEN_RATIO)


def _argmax(
    logits_SV: Tensor, temperature_S: Tensor | None = None, key_S: Tensor | None = None
) -> Tensor:
    """Return the first index of the maximum after temperature and noise, [S] int64.

    The index is -1 in rows whose maximum is not finite.
    """
    # On a CPU, Inductor fuses the plain function with the operations around it.
    maxima = gumbel_argmax if logits_SV.is_cuda else gumbel_argmax_reference
    best_SC, index_SC = maxima(logits_SV, temperature_S, key_S)
    chunk_S1 = best_SC.argmax(-1, keepdim=True)
    index_S = index_SC.gather(1, chunk_S1).squeeze(1)
    best_S = best_SC.gather(1, chunk_S1).squeeze(1)
    return torch.where(best_S.isfinite(), index_S, -1)
