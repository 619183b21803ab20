"""How far a bucket's step is from the eager one, in standard deviations.

What can be compared depends on the bucket's sampler. `full` and `scoring` store their logits, which
are compared. `greedy` and `random` store nothing but the tokens that they chose (to store more
would slow down each of their steps), so their logits are checked in two ways: by the eager logits,
the chosen token must lie as near to the best one as an allowed difference can move it; and the keys
and values that the step wrote depend on every layer but the last, and are compared as logits are.

Rounding makes correct steps differ, the more so the fewer bits a number has, and logits have any
magnitude. Differences are therefore divided by the standard deviation of a row's logits, or of a
layer's keys or values. A step that reads a wrong page or length, or skips something, is off by
several standard deviations, whatever the dtype. There is one exception: where a router to experts
is nearly undecided, rounding decides. In 16 bits that happens to some tokens, which may then differ
by more.

Shape suffixes: S rows; V tokens in the vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compiled_llm.report.report import Verification
from compiled_llm.runtime.step.sampler import (
    LogitsProcessorState,
    SamplingTensors,
    perturbed_logits,
)
from compiled_llm.runtime.verify.random_batches import RandomBatch
from compiled_llm.runtime.verify.snapshot import Snapshot

_TINY = 1e-30  # keeps constant values from dividing by zero


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Differences between a bucket and eager in all batches so far.

    Attributes:
        allowed: the largest difference that rounding may make, in standard deviations.
        rows: number of rows compared.
        agreeing: number of rows with equal tokens.
        logit_difference: the largest, or None if the sampler stores no logits.
        choice_gap: the largest difference of eager's logits between its token and the bucket's.
        cache_difference: the largest among keys and values.
        token_errors: of each batch, by token, in standard deviations: keys and values.
        row_errors: of each batch, by row, in standard deviations: everything else.
        mistakes: errors of other kinds, described.
    """

    allowed: float
    rows: int = 0
    agreeing: int = 0
    logit_difference: float | None = None
    choice_gap: float = 0.0
    cache_difference: float = 0.0
    token_errors: list[Tensor] = field(default_factory=list)
    row_errors: list[Tensor] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    @property
    def num_batches(self) -> int:
        return len(self.token_errors)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_errors))

    @property
    def error(self) -> float:
        """The largest difference in standard deviations."""
        return _largest(torch.cat([*self.token_errors, *self.row_errors]))

    def add(
        self,
        actual: Snapshot,
        expected: Snapshot,
        batch: RandomBatch,
        processors: LogitsProcessorState,
    ) -> None:
        """Compare one batch; `processors` is the state of its rows before the step."""
        assert expected.logits is not None
        spread_S = expected.logits.std(-1).clamp(min=_TINY)
        self.rows += len(batch.rows)
        self.agreeing += int((actual.tokens == expected.tokens).sum())
        self._check_exact(actual, expected, expected.logits.shape[1])
        token_errors = self._cache_errors(actual, expected, int(batch.num_new.sum()))
        # A logprob moves by at most twice as much as the logits do.
        scored = (actual.scored - expected.scored).abs() / 2 / spread_S.min()
        if len(scored):
            token_errors = torch.maximum(token_errors, scored.cpu())
        gaps_S = _choice_gaps(
            actual.tokens, expected, batch, processors, 2 * self.allowed * spread_S
        )
        self.choice_gap = max(self.choice_gap, _largest(gaps_S))
        row_errors = self._row_errors(actual, expected, gaps_S, spread_S)
        for errors, new in ((self.token_errors, token_errors), (self.row_errors, row_errors)):
            errors.append(new)
            if not torch.isfinite(new).all():
                self.mistakes.append("it computed values that are not finite")

    def failure(self, allowed_share: float) -> str | None:
        """Return why the bucket is wrong, or None.

        Args:
            allowed_share: share of the tokens and of the rows that may differ by more than
                `allowed`.
        """
        if self.mistakes:
            return "; ".join(dict.fromkeys(self.mistakes))
        for name, batches in (("tokens", self.token_errors), ("rows", self.row_errors)):
            errors = torch.cat(batches)
            off = int((errors > self.allowed).sum())
            if off > allowed_share * len(errors):
                return (
                    f"{off} of {len(errors)} {name} differ from eager, by up to {self.error:.3g} "
                    f"standard deviations; rounding may make {self.allowed:g}"
                )
        return None

    def result(self, allowed_share: float) -> Verification:
        """Return the result of all batches; for `allowed_share` see `failure`."""
        return Verification(
            batches=self.num_batches,
            rows=self.rows,
            agreement=self.agreeing / self.rows,
            logit_difference=self.logit_difference,
            choice_gap=self.choice_gap,
            cache_difference=self.cache_difference,
            error=self.error,
            allowed=self.allowed,
            failure=self.failure(allowed_share),
        )

    def _check_exact(self, actual: Snapshot, expected: Snapshot, vocab_size: int) -> None:
        """Check what must be equal, or within the vocabulary, whatever the rounding."""
        if not torch.equal(actual.positions, expected.positions):
            self.mistakes.append("it set wrong positions")
        in_vocabulary = all(
            ((tokens >= 0) & (tokens < vocab_size)).all()
            for tokens in (actual.tokens, actual.sampled)
        )
        if not in_vocabulary:
            self.mistakes.append("it chose tokens outside the vocabulary, or none")
        elif not torch.equal(actual.sampled, actual.tokens):
            self.mistakes.append("it reported other tokens than those that its rows feed next")
        untouched = zip(actual.untouched, expected.untouched, strict=True)
        if not all(_equal_or_nan(*pair) for pair in untouched):
            self.mistakes.append(
                "it wrote to other slots of the KV cache, or other states, than those of its tokens"
            )

    def _cache_errors(self, actual: Snapshot, expected: Snapshot, num_tokens: int) -> Tensor:
        """Return the largest error of each token's keys and values, [T] float32 on the host."""
        errors = torch.zeros(num_tokens)
        for mine, others in zip(actual.written, expected.written, strict=True):
            self.cache_difference = max(self.cache_difference, _largest(mine - others))
            errors = torch.maximum(errors, _errors(mine, others))
        return errors

    def _row_errors(
        self, actual: Snapshot, expected: Snapshot, gaps_S: Tensor, spread_S: Tensor
    ) -> Tensor:
        """Return the largest error of each row's choice, states and logits, [S] on the host."""
        # Both logits of a gap may be off, each by half of it.
        errors_S = gaps_S / 2 / spread_S
        for mine, others in zip(actual.states, expected.states, strict=True):
            errors_S = torch.maximum(errors_S, _errors(mine, others))
        if actual.logits is not None:
            assert expected.logits is not None
            difference_SV = actual.logits - expected.logits
            self.logit_difference = max(self.logit_difference or 0.0, _largest(difference_SV))
            relative_S = (difference_SV / spread_S[:, None]).abs().amax(1)
            errors_S = torch.maximum(errors_S, relative_S)
        return errors_S.cpu()


def _errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return the largest difference of each first index, in standard deviations."""
    relative = (actual - expected) / expected.std().clamp(min=_TINY)
    return relative.abs().flatten(1).amax(1)


def _choice_gaps(
    chosen_S: Tensor,
    expected: Snapshot,
    batch: RandomBatch,
    processors: LogitsProcessorState,
    slack_S: Tensor,
) -> Tensor:
    """Return how far the chosen tokens lie below eager's, by eager's logits, [S].

    A token up to `slack_S` below the cutoff of top-k, top-p and min-p counts as above it.
    """
    assert expected.logits is not None
    params = SamplingTensors.unpack(torch.from_numpy(batch.params).to(chosen_S.device))
    logits_SV = perturbed_logits(
        expected.logits, params, processors, expected.positions, slack_S=slack_S
    )
    chosen_S = chosen_S.clamp(0, logits_SV.shape[1] - 1)
    expected_S = logits_SV.gather(1, expected.tokens[:, None])[:, 0]
    actual_S = logits_SV.gather(1, chosen_S[:, None])[:, 0]
    return (expected_S - actual_S).clamp(min=0)


def _largest(values: Tensor) -> float:
    """Return the largest finite magnitude, 0 for no values."""
    if not values.numel():
        return 0.0
    return float(values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max())


def _equal_or_nan(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
