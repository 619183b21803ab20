"""One scheduled step: the batch for the model runner, and what to do with its output.

Shapes: S rows that sample a token, G groups of layers, T tokens of a prefill batch.
"""

from dataclasses import dataclass, field

import numpy as np

from compiled_llm.engine.input_batch import InputBatch
from compiled_llm.engine.kv_cache_manager import KVCacheManager
from compiled_llm.runtime.step.batch_inputs import RECENT, DecodeBatch, Int64, PrefillBatch
from compiled_llm.runtime.step.sampler_state import SamplerState


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a row's prompt from position `start` on."""

    row: int
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput:
    """One step.

    Attributes:
        batch: batch for the model runner.
        rows: [S] int64; rows that sample a token.
        generations: [S] int64; their generations (see `InputBatch`) when the step was scheduled.
        new_rows: rows whose requests take part in a step for the first time.
        sampler_updates: by row, sampler state to write before the step.
        scored: chunks whose tokens' logprobs are requested, and where in the batch they begin.
    """

    batch: DecodeBatch | PrefillBatch
    rows: Int64
    generations: Int64
    new_rows: list[int] = field(default_factory=list)
    sampler_updates: dict[int, SamplerState] = field(default_factory=dict)
    scored: list[tuple[Chunk, int]] = field(default_factory=list)


def decode_output(
    input_batch: InputBatch,
    cache: KVCacheManager,
    decoding: Int64,
    changed: tuple[Int64, Int64, Int64],
    *,
    same_rows: bool,
) -> SchedulerOutput:
    """Return a step that computes one more token for the decoding rows.

    Args:
        input_batch: the rows.
        cache: their block tables.
        decoding: [S] int64.
        changed: groups, rows and blocks of the entries of `cache.tables` that changed.
        same_rows: whether the previous step had the same rows.
    """
    _, changed_rows, _ = changed
    batch = DecodeBatch(
        rows=decoding,
        patch_index=cache.table_index(*changed),
        patch_page=cache.tables[changed].astype(np.int64),
        sampler=input_batch.cheapest_sampler(decoding),
        unchanged=same_rows and not len(changed_rows),
    )
    generations = input_batch.generation[decoding]
    return SchedulerOutput(batch=batch, rows=decoding, generations=generations)


def prefill_output(
    input_batch: InputBatch, cache: KVCacheManager, decoding: Int64, chunks: list[Chunk]
) -> SchedulerOutput:
    """Return a step of one more token for the decoding rows and of chunks of prompts."""
    chunk_rows = np.array([chunk.row for chunk in chunks], np.int64)
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    counts = np.array([chunk.count for chunk in chunks], np.int64)
    complete = starts + counts == input_batch.num_prefill_tokens[chunk_rows]
    seq_rows = np.concatenate([decoding, chunk_rows])
    sampling = np.concatenate([decoding, chunk_rows[complete]])
    scored = _find_scored(input_batch, len(decoding), chunks)
    targets, scores = _scoring_inputs(input_batch, len(decoding) + int(counts.sum()), scored)
    batch = PrefillBatch(
        ids=_token_ids(input_batch, len(decoding), chunks),
        logprob_targets=targets,
        num_logprobs=scores,
        seq_rows=seq_rows,
        starts=np.concatenate([input_batch.num_computed_tokens[decoding], starts]),
        lengths=np.concatenate([np.ones_like(decoding), counts]),
        block_tables=cache.tables[:, seq_rows],
        params=input_batch.params[seq_rows],
        recent=_recent_tokens(input_batch, len(decoding), chunks),
        is_prompt=np.concatenate([np.zeros_like(decoding), np.ones_like(chunk_rows)]),
        sample_mask=np.concatenate([np.ones_like(decoding), complete.astype(np.int64)]),
        sampler="scoring" if scored else input_batch.cheapest_sampler(sampling),
    )
    generations = input_batch.generation[sampling]
    return SchedulerOutput(batch=batch, rows=sampling, generations=generations, scored=scored)


def _token_ids(input_batch: InputBatch, num_decoding: int, chunks: list[Chunk]) -> Int64:
    """Return the token ids of the batch, [T]; -1 for a decoding row's, which the device has."""
    prompts = [
        input_batch.tokens[chunk.row, chunk.start : chunk.start + chunk.count] for chunk in chunks
    ]
    ids: Int64 = np.concatenate([np.full(num_decoding, -1), *prompts]).astype(np.int64)
    return ids


def _recent_tokens(input_batch: InputBatch, num_decoding: int, chunks: list[Chunk]) -> Int64:
    recent = [input_batch.recent_tokens(chunk.row)[None] for chunk in chunks]
    return np.concatenate([np.full((num_decoding, RECENT), -1), *recent])


def _find_scored(
    input_batch: InputBatch, begin: int, chunks: list[Chunk]
) -> list[tuple[Chunk, int]]:
    """Return the chunks with prompt logprobs, and where in the batch each begins.

    The first chunk of `chunks` begins at `begin`.
    """
    begins = np.cumsum([begin, *(chunk.count for chunk in chunks)]).tolist()
    return [
        (chunk, at)
        for chunk, at in zip(chunks, begins, strict=False)
        if input_batch.request(chunk.row).sampling_params.prompt_logprobs is not None
    ]


def _scoring_inputs(
    input_batch: InputBatch, num_tokens: int, scored: list[tuple[Chunk, int]]
) -> tuple[Int64, Int64]:
    """Return for each token the next token of its prompt and the number of top logprobs there.

    Returns:
        [T] and [T] int64, -1 where no logprob is requested.
    """
    targets, scores = np.full((2, num_tokens), -1, np.int64)
    for chunk, at in scored:
        request = input_batch.request(chunk.row)
        count = min(chunk.count, len(request.prompt_token_ids) - 1 - chunk.start)
        if count > 0:
            begin = chunk.start + 1
            targets[at : at + count] = input_batch.tokens[chunk.row, begin : begin + count]
            scores[at : at + count] = request.sampling_params.prompt_logprobs or 0
    return targets, scores
