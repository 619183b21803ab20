"""Batches for the tests of paged attention, with attention in float64 as the expected result."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import DEVICE

Operation = Callable[..., Tensor]
Batch = tuple[list[int], list[int]]
Options = dict[str, Any]

# Lengths of the sequences, and how many of their last tokens are queries.
MIXED = ([40, 7, 0, 33, 1, 100], [40, 1, 0, 5, 1, 37])
DECODE = ([40, 7, 0, 33, 16, 100], [1, 1, 1, 1, 1, 1])
# Triton's interpreter computes with numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Arguments of `Case` and of its `run` and `expected`.
SHAPES = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"heads": 9, "kv_heads": 3, "dim": 64}, {}, id="group-of-3"),
    pytest.param({"heads": 7, "kv_heads": 1, "dim": 80, "value_dim": 48}, {}, id="odd-dims"),
    pytest.param({"heads": 2, "kv_heads": 2, "dim": 256, "page_size": 32}, {}, id="wide-head"),
    pytest.param({"page_size": 128}, {"window": 9}, id="window"),
    pytest.param({}, {"window": -9}, id="chunks"),
    pytest.param({}, {"softcap": 2.0}, id="softcap"),
    pytest.param({"sinks": True}, {"window": 20, "softcap": 5.0}, id="sinks-window-softcap"),
    pytest.param({"heads": 6, "slopes": True}, {}, id="slopes"),
    pytest.param({"slopes": True}, {"window": 20}, id="slopes-window"),
]
NAN_SHAPES = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"sinks": True, "slopes": True}, {"softcap": 2.0}, id="all"),
]


class Case:
    """A ragged batch over a scattered cache, in which everything that must not be read is NaN.

    Args:
        lens: tokens of each sequence.
        new: number of its last tokens that are queries.
        pad_tokens: tokens past those of all sequences.
    """

    def __init__(
        self, lens: list[int], new: list[int], *, heads: int = 4, kv_heads: int = 2, dim: int = 32,
        value_dim: int | None = None, page_size: int = 16, dtype: torch.dtype = torch.float32,
        sinks: bool = False, slopes: bool = False, pad_tokens: int = 0,
    ) -> None:  # fmt: skip
        self._generator = torch.Generator().manual_seed(0)
        self._dtype = dtype
        value_dim = value_dim or dim
        max_pages = max(1, *(-(-length // page_size) for length in lens)) + 1
        num_pages = 1 + max_pages * len(lens) + 2
        nan: dict[str, Any] = {"fill_value": float("nan"), "dtype": dtype, "device": DEVICE}
        self.k_cache = torch.full((num_pages, page_size, kv_heads, dim), **nan)
        self.v_cache = torch.full((num_pages, page_size, kv_heads, value_dim), **nan)
        self.table = torch.zeros(len(lens), max_pages, dtype=torch.int32, device=DEVICE)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        pages = list(range(1, num_pages))
        random.Random(0).shuffle(pages)
        for s, length in enumerate(lens):
            self.keys.append(self._rand(length, kv_heads, dim))
            self.values.append(self._rand(length, kv_heads, value_dim))
            self._fill_cache(s, pages)
        self.lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        starts = [0, *itertools.accumulate(new)]
        self.starts = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        # Heads before tokens in memory, as in a model: the ops must honour strides.
        self.q = self._rand(heads, sum(new) + pad_tokens, dim).transpose(0, 1)
        self.sinks = self._rand(heads) if sinks else None
        self.slopes = None
        if slopes:
            self.slopes = torch.rand(heads, generator=self._generator).to(DEVICE)
        self.split_counters = torch.zeros(len(lens) * kv_heads, dtype=torch.int32, device=DEVICE)

    def _rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(DEVICE, self._dtype)

    def _fill_cache(self, s: int, pages: list[int]) -> None:
        """Write the keys and values of sequence s to pages taken from the list."""
        keys, values = self.keys[s], self.values[s]
        page_size = self.k_cache.shape[1]
        for begin in range(0, len(keys), page_size):
            page = pages.pop()
            self.table[s, begin // page_size] = page
            end = min(begin + page_size, len(keys))
            self.k_cache[page, : end - begin] = keys[begin:end]
            self.v_cache[page, : end - begin] = values[begin:end]

    def run(
        self, op: Operation, *, scale: float = 0.3, window: int = 0, softcap: float = 0.0
    ) -> Tensor:
        """Call an implementation of `paged_attention`."""
        max_query_len = int((self.starts[1:] - self.starts[:-1]).max())
        return op(
            self.q, self.k_cache, self.v_cache, self.table, self.starts, self.lens,
            self.split_counters, self.sinks, self.slopes, scale, window, softcap, max_query_len,
        )  # fmt: skip

    def expected(self, *, scale: float = 0.3, window: int = 0, softcap: float = 0.0) -> Tensor:
        """Return attention in float64 on contiguous tensors, computed a token at a time."""
        T, H, _ = self.q.shape
        out = torch.zeros(T, H, self.v_cache.shape[-1], dtype=torch.float64, device=DEVICE)
        for s, (begin, end) in enumerate(itertools.pairwise(self.starts.tolist())):
            for token in range(begin, end if self.lens[s] else begin):
                position = int(self.lens[s]) - (end - token)
                out[token] = self._attend(s, token, position, scale, window, softcap)
        return out

    def _attend(
        self, s: int, token: int, position: int, scale: float, window: int, softcap: float
    ) -> Tensor:
        first = 0
        if window > 0:
            first = max(0, position - window + 1)
        elif window:
            first = position // -window * -window
        repeat = self.q.shape[1] // self.k_cache.shape[2]
        keys, values = (
            tensors[s][first : position + 1].double().repeat_interleave(repeat, 1)
            for tensors in (self.keys, self.values)
        )
        scores = torch.einsum("hd,khd->hk", self.q[token].double(), keys) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if self.slopes is not None:
            distance = torch.arange(first - position, 1, device=DEVICE)
            scores += self.slopes.double()[:, None] * distance
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.double()[:, None]], 1)
        return torch.einsum("hk,khd->hd", scores.softmax(-1)[:, : len(keys)], values)


def check_nan(op: Operation, batch: Batch, shape: Options, options: Options, position: str) -> None:
    """Check that NaN in one tensor reaches the outputs that depend on it and no others.

    Args:
        position: "query" of the last token, or "key" or "value" of one of the first tokens of the
            last sequence.
    """
    case = Case(*batch, **shape)
    token, group, feature = 3, 1, 7
    page = case.table[-1, 0]
    nan = float("nan")
    if position == "query":
        case.q[-1, 1, feature] = nan
    elif position == "key":
        case.k_cache[page, token, group, feature] = case.keys[-1][token, group, feature] = nan
    else:
        case.v_cache[page, token, group, feature] = case.values[-1][token, group, feature] = nan
    expected = case.expected(**options).float()
    assert 0 < expected.isnan().sum() < expected.numel() / 2
    actual = case.run(op, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
