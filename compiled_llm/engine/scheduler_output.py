"""One step: what the runtime is to compute, and what the engine is to learn from it."""

from dataclasses import dataclass, field

import numpy as np

from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.runtime.step.batch_inputs import RECENT, DecodeBatch, Int64, PrefillBatch


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a row's prompt from `start` on, computed by one step."""

    row: int
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput:
    """One step.

    Attributes:
        batch: for the runtime.
        rows: [S] that sample a token; owners: [S] who had them (see `InputBatch.owner`).
        joined: rows that a request has taken with this step.
        lifted: rows whose stopping tokens are no longer banned.
        scored: chunks whose tokens' logprobs are wanted.
    """

    batch: DecodeBatch | PrefillBatch
    rows: Int64
    owners: Int64
    joined: list[int] = field(default_factory=list)
    lifted: list[int] = field(default_factory=list)
    scored: list[tuple[Chunk, int]] = field(default_factory=list)


def plan_decode(
    rows: InputBatch,
    cache: KVCacheManager,
    decoding: Int64,
    changed: tuple[Int64, Int64, Int64],
    *,
    same_rows: bool,
) -> SchedulerOutput:
    """One more token for the decoding rows; `changed` entries of the cache's tables go with it."""
    _, changed_rows, _ = changed
    batch = DecodeBatch(
        rows=decoding,
        patch_index=cache.table_index(*changed),
        patch_page=cache.tables[changed].astype(np.int64),
        sampler=rows.batch_sampler(decoding),
        unchanged=same_rows and not len(changed_rows),
    )
    return SchedulerOutput(batch=batch, rows=decoding, owners=rows.owner[decoding])


def plan_prefill(
    rows: InputBatch, cache: KVCacheManager, decoding: Int64, chunks: list[Chunk]
) -> SchedulerOutput:
    """One more token for the decoding rows, and chunks of other rows' prompts."""
    chunk_rows = np.array([chunk.row for chunk in chunks], np.int64)
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    counts = np.array([chunk.count for chunk in chunks], np.int64)
    ends = starts + counts == rows.target[chunk_rows]
    seq_rows = np.concatenate([decoding, chunk_rows])
    sampling = np.concatenate([decoding, chunk_rows[ends]])
    scored = _scored(rows, len(decoding), chunks)
    targets, scores = _scores(rows, len(decoding) + int(counts.sum()), scored)
    prompts = [rows.tokens[chunk.row, chunk.start : chunk.start + chunk.count] for chunk in chunks]
    recent = [
        np.full((len(decoding), RECENT), -1),
        *(rows.recent(chunk.row)[None] for chunk in chunks),
    ]
    batch = PrefillBatch(
        ids=np.concatenate([np.full(len(decoding), -1), *prompts]).astype(np.int64),
        logprob_targets=targets,
        num_logprobs=scores,
        seq_rows=seq_rows,
        starts=np.concatenate([rows.computed[decoding], starts]),
        lengths=np.concatenate([np.ones_like(decoding), counts]),
        block_tables=cache.tables[:, seq_rows],
        params=rows.params[seq_rows],
        recent=np.concatenate(recent),
        is_prompt=np.concatenate([np.zeros_like(decoding), np.ones_like(chunk_rows)]),
        sample_mask=np.concatenate([np.ones_like(decoding), ends.astype(np.int64)]),
        sampler="scoring" if scored else rows.batch_sampler(sampling),
    )
    return SchedulerOutput(batch=batch, rows=sampling, owners=rows.owner[sampling], scored=scored)


def _scored(rows: InputBatch, begin: int, chunks: list[Chunk]) -> list[tuple[Chunk, int]]:
    """The chunks whose tokens' logprobs are wanted, and where in the batch their tokens begin, the first ones at `begin`."""
    begins = np.cumsum([begin, *(chunk.count for chunk in chunks)]).tolist()
    placed = zip(chunks, begins, strict=False)
    return [
        (chunk, at)
        for chunk, at in placed
        if rows.request(chunk.row).params.prompt_logprobs is not None
    ]


def _scores(
    rows: InputBatch, num_tokens: int, scored: list[tuple[Chunk, int]]
) -> tuple[Int64, Int64]:
    """For each token of the batch the one that follows it in its prompt and how many top logprobs are wanted there, or -1."""
    targets, scores = np.full((2, num_tokens), -1, np.int64)
    for chunk, at in scored:
        request = rows.request(chunk.row)
        count = min(chunk.count, len(request.prompt_token_ids) - 1 - chunk.start)
        if count > 0:
            targets[at : at + count] = rows.tokens[
                chunk.row, chunk.start + 1 : chunk.start + 1 + count
            ]
            scores[at : at + count] = request.params.prompt_logprobs or 0
    return targets, scores
