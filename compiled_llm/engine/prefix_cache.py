"""Prefix caching: hashes of full blocks, and the longest prefix that every group has cached."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compiled_llm.engine.block_table import BlockTable

Tokens = NDArray[np.int32]


def hash_blocks(tokens: Tokens, block_size: int, hashes: list[bytes]) -> list[bytes]:
    """Append the hashes of a sequence's further full blocks to `hashes`, and return it.

    The hash of a block is a digest of the previous block's hash and of the block's tokens.
    """
    for begin, end in pairwise(range(len(hashes) * block_size, len(tokens) + 1, block_size)):
        before = hashes[-1] if hashes else b""
        digest = hashlib.blake2b(before + tokens[begin:end].tobytes(), digest_size=16)
        hashes.append(digest.digest())
    return hashes


@dataclass(slots=True, kw_only=True)
class Candidate:
    """A waiting sequence that is to be admitted.

    Attributes:
        num_tokens: number of its tokens.
        block_hashes: hashes of its full blocks (see `hash_blocks`).
        sharable: hashes of the blocks that may be shared. The block of the last token is not
            among them, because the logits of that token must be computed.
        num_shared: number of cached blocks that the last attempt found.
        num_needed: free blocks that the last attempt needed in each group, including shared blocks
            that no other sequence uses.
    """

    num_tokens: int
    block_hashes: list[bytes]
    sharable: frozenset[bytes]
    num_shared: int = 0
    num_needed: list[int] = field(default_factory=list)


def longest_cached_prefix(tables: Sequence[BlockTable], hashes: list[bytes]) -> int:
    """Return how many blocks from the beginning every group has cached.

    A group with a window needs only the blocks within the window before the prefix's end. No hash
    is looked up twice in a group, so the time is linear in the number of hashes.
    """
    count = len(hashes)
    for table in tables:
        if table.reach.is_full:
            count = table.pool.num_cached(hashes[:count])
    # Each group has the blocks from here to `count`.
    begins = [0 if table.reach.is_full else count for table in tables]
    group = 0
    while count and group < len(tables):
        table = tables[group]
        first = table.first_visible(count * table.block_size)
        missing = _last_missing(table, hashes, range(first, min(begins[group], count)))
        if missing is None:
            begins[group] = min(begins[group], first)
            group += 1
        else:
            # Every longer prefix that needs this block is ruled out: start over from a shorter one.
            begins[group] = count = missing
            group = 0
    return count


def _last_missing(table: BlockTable, hashes: list[bytes], blocks: range) -> int | None:
    for block in reversed(blocks):
        if table.pool.get_cached_block(hashes[block]) is None:
            return block
    return None
