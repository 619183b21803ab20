"""Each bucket against eager: the same step, uncompiled and without padding, on the same state and the same paged cache.

In the eager step each op of ours runs its plain reference, on any device, so that kernels are not compared with themselves. One
batch has a sequence as long as `limits.max_model_len` allows, since a kernel may be right for short sequences alone.

What a bucket has to show depends on its sampler. `full` and `scoring` keep their logits, which are compared. `greedy` and
`random` keep nothing but the tokens that they chose (to keep more would cost every step of theirs), so their logits show in two
ways: by the eager logits, the chosen token must lie as near to the best as a permitted difference can move it; and the keys and
values that the step wrote depend on every layer but the last, and are compared as logits are.

Rounding makes honest steps differ, the more so the fewer bits a number has, and a logit is as likely to be 0.01 as 10. So
differences count in standard deviations: of a row's logits, or of a layer's keys or values. A step that reads another page or
length, or skips something, is off by several of them, whatever the dtype. One thing more may differ: where a token is routed to
experts and the router is all but undecided, rounding decides. In 16 bits that happens to some tokens, which may then be off.

Whatever a bucket does to them meanwhile, the state and the pages are afterwards as they were before.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compiled_llm.config.schema import Sampler
from compiled_llm.errors import StrictError
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.report.report import BucketState, Verification
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.capture.captured_bucket import CapturedBucket
from compiled_llm.runtime.compilation.compiler import release
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.runtime.step.batch_inputs import RECENT
from compiled_llm.runtime.step.sampler import (
    LogitsProcessorState,
    SamplingTensors,
    perturbed_logits,
)
from compiled_llm.runtime.verify.random_batches import (
    BatchShape,
    RandomBatch,
    make_random_batch,
    stage,
)
from compiled_llm.runtime.verify.snapshot import Snapshot, preserve, take_snapshot
from compiled_llm.system.compiler_lock import run_eagerly
from passes.ops.library import use_references

# The largest difference that rounding may make, in standard deviations.
ALLOWED = {torch.float32: 0.01, torch.float16: 0.25, torch.bfloat16: 1.0}
ROUTED_OTHERWISE = 0.25  # the share of tokens that may differ by more, with experts and in 16 bits
_FIRST: tuple[BatchShape, ...] = ("full", "long")  # batches; those that follow are of random sizes
_BATCHES, _TOKENS = 4, 16  # at least


@dataclass(slots=True)
class _Findings:
    """Of all batches so far; the errors of each batch's tokens (keys and values) and rows (the rest), in standard deviations."""

    rows: int = 0
    agreeing: int = 0
    logit_difference: float | None = None
    choice_gap: float = 0.0
    cache_difference: float = 0.0
    token_errors: list[Tensor] = field(default_factory=list)
    row_errors: list[Tensor] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        return _largest(torch.cat([*self.token_errors, *self.row_errors]))


def verify_bucket(
    entry: CapturedBucket, model: ServedModel, memory: Memory, limits: Limits, *, strict: bool
) -> None:
    """Verify a compiled bucket; one that fails is not used. With `strict` that is an error, StrictError."""
    if entry.compiled is None:
        return
    report = entry.report
    report.verification = verify(entry.bucket, entry.compiled.launch, model, memory, limits)
    failure = report.verification.failure
    if failure is not None:
        release(entry.compiled, model.device)
        entry.compiled, report.state, report.failure = (
            None,
            BucketState.FAILED,
            f"verification: {failure}",
        )
        if strict:
            raise StrictError(f"bucket {entry.bucket} is not what eager is: {failure}")


@torch.no_grad()
def verify(
    bucket: Bucket, launch: Callable[[], object], model: ServedModel, memory: Memory, limits: Limits
) -> Verification:
    """Replay the bucket on random batches, lengths and block tables changing between them, and compare it with eager."""
    found, allowed = _Findings(), ALLOWED[model.dtype]
    while len(found.token_errors) < _BATCHES or sum(map(len, found.token_errors)) < _TOKENS:
        batch = len(found.token_errors)
        extent = _FIRST[batch] if batch < len(_FIRST) else "random"
        _try(
            make_random_batch(bucket, memory, limits, seed=batch, extent=extent),
            found,
            bucket,
            launch,
            model,
            memory,
            limits,
        )
    routed = model.dtype != torch.float32 and any(
        "experts" in name for name in model.config.get_text_config().to_dict()
    )
    return Verification(
        batches=len(found.token_errors),
        rows=found.rows,
        agreement=found.agreeing / found.rows,
        logit_difference=found.logit_difference,
        choice_gap=found.choice_gap,
        cache_difference=found.cache_difference,
        error=found.error,
        allowed=allowed,
        failure=_failure(found, allowed, ROUTED_OTHERWISE if routed else 0.0),
    )


def _try(
    trial: RandomBatch,
    found: _Findings,
    bucket: Bucket,
    launch: Callable[[], object],
    model: ServedModel,
    memory: Memory,
    limits: Limits,
) -> None:
    """One batch, by the bucket and by eager."""
    sampler: Sampler = "scoring" if bucket.sampler == "scoring" else "full"
    reference = memory.eager_bucket(Bucket(bucket.kind, int(trial.counts.sum()), sampler), limits)
    with preserve(memory, trial):
        stage(trial, memory, bucket.size)
        launch()
        got = take_snapshot(trial, memory, bucket)
        stage(trial, memory, reference.size)
        history = _history(trial, memory)
        with use_references():
            run_eagerly(memory.step(model, reference))
            _compare(
                found,
                got,
                take_snapshot(trial, memory, reference),
                trial,
                history,
                ALLOWED[model.dtype],
            )


def _failure(found: _Findings, allowed: float, share: float) -> str | None:
    """Why the bucket is wrong, where more than this share of the tokens or rows differ by more than what is allowed."""
    if found.wrong:
        return "; ".join(dict.fromkeys(found.wrong))
    for name, errors in (
        ("tokens", torch.cat(found.token_errors)),
        ("rows", torch.cat(found.row_errors)),
    ):
        off = int((errors > allowed).sum())
        if off > share * len(errors):
            return (
                f"{off} of {len(errors)} {name} differ from eager, by up to {found.error:.3g} standard deviations, "
                f"where rounding may make {allowed:g}"
            )
    return None


def _history(trial: RandomBatch, memory: Memory) -> LogitsProcessorState:
    """What the sampler knows of the trial's rows before the step."""
    state, rows = memory.state, torch.from_numpy(trial.rows).to(memory.state.tokens.device)
    recent = torch.full((len(trial.rows), RECENT), -1, device=rows.device)
    return LogitsProcessorState(state.bias[rows], state.counts[rows], state.bad_words[rows], recent)


def _compare(
    found: _Findings,
    got: Snapshot,
    want: Snapshot,
    trial: RandomBatch,
    history: LogitsProcessorState,
    allowed: float,
) -> None:
    assert want.logits is not None
    found.rows += len(trial.rows)
    found.agreeing += int((got.tokens == want.tokens).sum())
    spread_S = want.logits.std(-1).clamp(min=1e-30)
    if not torch.equal(got.positions, want.positions):
        found.wrong.append("it left rows at other positions")
    vocab_size = want.logits.shape[1]
    if not all(
        ((tokens >= 0) & (tokens < vocab_size)).all() for tokens in (got.tokens, got.sampled)
    ):
        found.wrong.append("it chose tokens that are not in the vocabulary, or none")
    elif not torch.equal(got.sampled, got.tokens):
        found.wrong.append("it reported other tokens than its rows go on with")
    if not all(_same(*pair) for pair in zip(got.kept, want.kept, strict=True)):
        found.wrong.append(
            "it wrote to places in the KV cache, or to states, that are not its tokens'"
        )
    token_errors = torch.zeros(int(trial.counts.sum()))
    for mine, others in zip(got.written, want.written, strict=True):
        found.cache_difference = max(found.cache_difference, _largest(mine - others))
        errors = ((mine - others) / others.std().clamp(min=1e-30)).abs().flatten(1).amax(1)
        token_errors = torch.maximum(token_errors, errors)
    row_errors = _gaps(got.tokens, want, trial, history, 2 * allowed * spread_S)
    found.choice_gap = max(found.choice_gap, _largest(row_errors))
    row_errors = row_errors / 2 / spread_S
    for mine, others in zip(got.states, want.states, strict=True):
        errors = ((mine - others) / others.std().clamp(min=1e-30)).abs().flatten(1).amax(1)
        row_errors = torch.maximum(row_errors, errors)
    if got.logits is not None:
        found.logit_difference = max(
            found.logit_difference or 0.0, _largest(got.logits - want.logits)
        )
        row_errors = torch.maximum(
            row_errors, ((got.logits - want.logits) / spread_S[:, None]).abs().amax(1)
        )
    # A logprob moves by at most twice what logits do, and so does the gap of a choice.
    scored = (got.scored - want.scored).abs() / 2 / spread_S.min()
    _keep(
        found.token_errors,
        torch.maximum(token_errors, scored.cpu()) if len(scored) else token_errors,
        found,
    )
    _keep(found.row_errors, row_errors.cpu(), found)


def _gaps(
    chosen_S: Tensor,
    want: Snapshot,
    trial: RandomBatch,
    history: LogitsProcessorState,
    slack_S: Tensor,
) -> Tensor:
    """How far the chosen tokens lie below the right ones, by eager's logits, [S]; a little below a cutoff is still above it."""
    assert want.logits is not None
    packed = torch.from_numpy(trial.params).to(chosen_S.device)
    scores_SV = perturbed_logits(
        want.logits, SamplingTensors.unpack(packed), history, want.positions, slack_S=slack_S
    )
    chosen_S = chosen_S.clamp(0, scores_SV.shape[1] - 1)
    right_S, got_S = (
        scores_SV.gather(1, tokens[:, None])[:, 0] for tokens in (want.tokens, chosen_S)
    )
    return (right_S - got_S).clamp(min=0)


def _keep(errors: list[Tensor], new: Tensor, found: _Findings) -> None:
    errors.append(new)
    if not torch.isfinite(new).all():
        found.wrong.append("it gave numbers that are not finite")


def _largest(values: Tensor) -> float:
    return (
        float(values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max())
        if values.numel()
        else 0.0
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
