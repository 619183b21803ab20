"""The samplers: logits to next ids, as a part of the graph.

Drawing is by the Gumbel-max trick: argmax(logits / temperature + noise), where the noise is a pure function of (seed,
position, token id); see `passes.ops.gumbel_argmax`. The same request so draws the same ids in any batch, bucket or order, and no
generator state exists to be captured.

A row whose scores hold NaN or infinity, or in which every token is banned, has no next token: its id is -1.

Shapes: S sequences, V tokens in the vocabulary, W banned words of up to L tokens each.
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

_GOLDEN = 0x9E3779B1 - 2**32
_FLOATS = {
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
}
_BIASED, _COUNTED, _BAD_WORDS, _EXTERNAL = 1, 2, 4, 8


class RowParams(NamedTuple):
    """Sampling parameters of the rows, [S] each: int64, or float32 where `SamplingParams` has a float.

    logprobs: how many top logprobs a row wants besides its own token's, -1 for none at all.
    flags: 1 the row's bias counts, 2 its token counts, 4 its banned words, 8 its tokens are chosen outside the graph.
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
    def of(cls, packed_SC: Tensor) -> "RowParams":
        """Unpack int64 rows; floats travel as the bits of a float64."""
        columns = packed_SC.unbind(1)
        return cls(
            *(
                c.view(torch.float64).float() if n in _FLOATS else c
                for n, c in zip(cls._fields, columns, strict=True)
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
        external: bool = False,
    ) -> NDArray[np.int64]:
        """One row, [C]."""
        flags = (
            _BIASED * biased + _COUNTED * counted + _BAD_WORDS * bad_words + _EXTERNAL * external
        )
        floats = np.array(
            [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty]
        ).view(np.int64)
        t, p, m, *penalties = floats.tolist()
        return np.array([seed, t, top_k, p, m, *penalties, logprobs, flags], np.int64)

    @property
    def counted(self) -> Any:
        return (self.flags & _COUNTED) > 0

    @property
    def external(self) -> Any:
        return (self.flags & _EXTERNAL) > 0


class History(NamedTuple):
    """What the full sampler knows of the rows besides their parameters: [S, V], [S, V], [S, W, L], [S, L - 1]; see `StepBuffers`."""

    bias: Tensor
    counts: Tensor
    bad_words: Tensor
    recent: Tensor


def sample_greedy(logits_SV: Tensor) -> Tensor:
    """The most likely ids [S] int64, the lowest of equals."""
    return _choose(logits_SV)


def sample_random(
    logits_SV: Tensor, temperature_S: Tensor, seed_S: Tensor, position_S: Tensor
) -> Tensor:
    """Next ids [S] int64. Greedy where the temperature (float32) is 0; seeds and positions are int64."""
    return _choose(logits_SV, temperature_S, _key(seed_S, position_S))


def sample_full(
    logits_SV: Tensor, params: RowParams, history: History, position_S: Tensor
) -> Tensor:
    """Next ids [S] int64, with all that `SamplingParams` has; in transformers' order."""
    return _choose(*_before_noise(logits_SV, params, history, position_S))


def scores_full(
    logits_SV: Tensor, params: RowParams, history: History, position_S: Tensor, *, slack_S: Tensor
) -> Tensor:
    """What `sample_full` takes the greatest of, noise included, [S, V]; tokens up to `slack` below the cutoff stay."""
    return add_gumbel_noise(*_before_noise(logits_SV, params, history, position_S, slack_S))


def _before_noise(
    logits_SV: Tensor,
    params: RowParams,
    history: History,
    position_S: Tensor,
    slack_S: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores after all but the noise, which rows have noise (1, else 0), and its keys."""
    scores_SV = adjust(logits_SV.float(), params, history)
    scaled_SV = _scale(scores_SV, params.temperature)
    cutoff_S = sampling_cutoff(scaled_SV, params.top_k, params.top_p, params.min_p)
    cutoff_S = cutoff_S if slack_S is None else cutoff_S - slack_S
    kept_SV = torch.where(scaled_SV < cutoff_S[:, None], float("-inf"), scaled_SV)  # NaN is kept
    draws_S = params.temperature > 0
    return (
        torch.where(draws_S[:, None], kept_SV, scores_SV),
        draws_S.float(),
        _key(params.seed, position_S),
    )


def adjust(logits_SV: Tensor, params: RowParams, history: History) -> Tensor:
    """Logits after bias, penalties and banned words, float32."""
    scores_SV = torch.where(
        ((params.flags & _BIASED) > 0)[:, None], logits_SV + history.bias, logits_SV
    )
    generated_SV = (history.counts >> 1).float()
    factor_S1 = params.repetition_penalty[:, None]
    repeated_SV = torch.where(scores_SV > 0, scores_SV / factor_S1, scores_SV * factor_S1)
    penalised_SV = torch.where(history.counts > 0, repeated_SV, scores_SV)
    penalised_SV = penalised_SV - params.frequency_penalty[:, None] * generated_SV
    penalised_SV = penalised_SV - params.presence_penalty[:, None] * (generated_SV > 0)
    scores_SV = torch.where(params.counted[:, None], penalised_SV, scores_SV)
    return scores_SV + _ban(params, history, logits_SV.shape[1])


def _ban(params: RowParams, history: History, vocab_size: int) -> Tensor:
    """-inf [S, V] where a banned word would be completed, else 0."""
    words_SWL, recent_S1R = history.bad_words, history.recent[:, None]
    prefix_SWR, last_SW = words_SWL[..., :-1], words_SWL[..., -1]
    begun_SW = ((prefix_SWR == recent_S1R) | (prefix_SWR < 0)).all(-1)
    begun_SW = begun_SW & (last_SW >= 0) & ((params.flags & _BAD_WORDS) > 0)[:, None]
    bans_SW = torch.zeros_like(begun_SW, dtype=torch.float32).masked_fill(begun_SW, float("-inf"))
    zeros_SV = torch.zeros(
        words_SWL.shape[0], vocab_size, dtype=torch.float32, device=words_SWL.device
    )
    return zeros_SV.scatter_add(1, last_SW.clamp(min=0), bans_SW)


def _scale(logits_SV: Tensor, temperature_S: Tensor) -> Tensor:
    return logits_SV / temperature_S.clamp(min=1e-6)[:, None]


def _key(seed_S: Tensor, position_S: Tensor) -> Tensor:
    """What the noise of a row is a function of, [S] int32."""
    return lowbias32(
        lowbias32(lowbias32(seed_S.int()) ^ (seed_S >> 32).int()) + position_S.int() * _GOLDEN
    )


def _choose(
    scores_SV: Tensor, temperature_S: Tensor | None = None, key_S: Tensor | None = None
) -> Tensor:
    """The first of the greatest, after temperature and noise; -1 in rows whose greatest score is not finite."""
    # On a CPU, Inductor fuses the plain function with what is around it.
    maxima = gumbel_argmax if scores_SV.is_cuda else gumbel_argmax_reference
    best_SC, place_SC = maxima(scores_SV, temperature_S, key_S)
    chunk_S1 = best_SC.argmax(-1, keepdim=True)
    place_S, best_S = (
        place_SC.gather(1, chunk_S1).squeeze(1),
        best_SC.gather(1, chunk_S1).squeeze(1),
    )
    return torch.where(best_S.isfinite(), place_S, -1)
