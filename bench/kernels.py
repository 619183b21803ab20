"""Paged attention alone, against the bytes it must read and against torch's sdpa and flex_attention on contiguous tensors.

    pytest bench/kernels.py          # or `compiled-llm bench kernels`, which prints the rates

On a GPU each measurement replays a CUDA graph of several calls on different tensors, so that no call finds its keys in the L2
cache and no launch is timed; the sizes are those of the models that the suite runs. On a CPU the references run, on tiny sizes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from passes.ops.paged_attention import paged_attention

_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if _GPU else ("cpu", torch.float32)
_PAGE = 16
_L2_BYTES = 128 * 2**20  # more than any GPU's cache holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sequences, their new tokens and all their tokens, query heads, key heads, head dim."""

    sequences: int
    queries: int
    length: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.sequences}x{self.length}-{self.heads}/{self.kv_heads}x{self.dim}"

    @property
    def num_bytes(self) -> int:
        """Keys and values, read once, and queries and outputs."""
        cached, ends = self.length * self.kv_heads, self.queries * self.heads
        return 2 * self.sequences * (cached + ends) * self.dim * DTYPE.itemsize

    @property
    def flops(self) -> int:
        """Of the two products, where a query sees the keys up to its own."""
        seen = self.queries * (2 * self.length - self.queries + 1) // 2
        return 4 * self.sequences * seen * self.heads * self.dim


def _shapes() -> tuple[list[Shape], list[Shape]]:
    """For decode, and for prefill."""
    if not _GPU:
        sizes = {"heads": 4, "kv_heads": 2, "dim": 32}
        return [Shape(sequences=2, queries=1, length=64, **sizes)], [
            Shape(sequences=1, queries=32, length=32, **sizes)
        ]
    decode, prefill = [], []
    for heads in (16, 32):  # Qwen3-0.6B, Llama-3.1-8B
        sizes = {"heads": heads, "kv_heads": 8, "dim": 128}
        batches = [(1, 512), (8, 512), (32, 512), (128, 1024), (1, 16384), (8, 16384)]
        decode += [
            Shape(sequences=batch, queries=1, length=length, **sizes) for batch, length in batches
        ]
        prefill += [
            Shape(sequences=batch, queries=length, length=length, **sizes)
            for batch, length in [(16, 128), (2, 1024), (1, 4096)]
        ]
    return decode, prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The same keys and values in pages [P, B, G, D] and contiguous [S, G, K, D]; queries as [S, H, Q, D] and [S * Q, H, D]."""

    shape: Shape
    q: Tensor
    flat_q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    split_counters: Tensor

    @classmethod
    def make(cls, shape: Shape, seed: int) -> "Inputs":
        """Random, in pages of a random order."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": DEVICE, "dtype": DTYPE}
        s, pages = shape.sequences, -(-shape.length // _PAGE)
        k_cache, v_cache = (
            torch.randn(s * pages, _PAGE, shape.kv_heads, shape.dim, **options) for _ in range(2)
        )
        order = torch.randperm(s * pages, generator=generator, device=DEVICE).view(s, pages)
        k, v = (
            cache[order]
            .view(s, pages * _PAGE, shape.kv_heads, shape.dim)[:, : shape.length]
            .transpose(1, 2)
            .contiguous()
            for cache in (k_cache, v_cache)
        )
        q = torch.randn(s, shape.heads, shape.queries, shape.dim, **options)
        return cls(
            shape=shape,
            q=q,
            flat_q=q.transpose(1, 2).reshape(-1, shape.heads, shape.dim),
            k=k,
            v=v,
            k_cache=k_cache,
            v_cache=v_cache,
            block_table=order.int(),
            query_start=torch.arange(s + 1, device=DEVICE, dtype=torch.int32) * shape.queries,
            seq_lens=torch.full((s,), shape.length, device=DEVICE, dtype=torch.int32),
            split_counters=torch.zeros(s * shape.kv_heads, device=DEVICE, dtype=torch.int32),
        )


# Each gives [S, H, Q, D].
Attend = Callable[[Inputs], Tensor]


def _paged(inputs: Inputs) -> Tensor:
    shape = inputs.shape
    out_THD: Tensor = paged_attention(
        inputs.flat_q, inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.query_start, inputs.seq_lens,
        inputs.split_counters, None, None, shape.dim**-0.5, 0, 0.0, shape.queries,
    )  # fmt: skip
    return out_THD.view(shape.sequences, shape.queries, shape.heads, shape.dim).transpose(1, 2)


def _sdpa(inputs: Inputs) -> Tensor:
    causal = inputs.shape.queries > 1
    return torch.nn.functional.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, is_causal=causal, enable_gqa=True
    )


def _flex(inputs: Inputs) -> Tensor:
    out: Tensor = _flex_function()(
        inputs.q, inputs.k, inputs.v, block_mask=_causal_mask(inputs.shape), enable_gqa=True
    )
    return out


@functools.cache
def _flex_function() -> Callable[..., Any]:
    return (
        torch.compile(flex_attention, dynamic=False) if _GPU else flex_attention
    )  # a CPU takes half a minute to compile it


@functools.cache
def _causal_mask(shape: Shape) -> BlockMask | None:
    if shape.queries == 1:
        return None
    return create_block_mask(
        lambda b, h, q, k: q >= k, None, None, shape.queries, shape.length, device=DEVICE
    )


KERNELS: dict[str, Attend] = {"paged": _paged, "sdpa": _sdpa, "flex": _flex}
_DECODE, _PREFILL = _shapes()
_TOLERANCE = 2e-2 if _GPU else 1e-4


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("shape", _DECODE, ids=str)
def test_decode(benchmark: Any, shape: Shape, kernel: str) -> None:
    _measure(benchmark, shape, kernel)


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("shape", _PREFILL, ids=str)
def test_prefill(benchmark: Any, shape: Shape, kernel: str) -> None:
    _measure(benchmark, shape, kernel)


def _measure(benchmark: Any, shape: Shape, kernel: str) -> None:
    copies = max(2, min(20, _L2_BYTES // shape.num_bytes)) if _GPU else 1
    inputs = [Inputs.make(shape, seed) for seed in range(copies)]
    attend = KERNELS[kernel]
    torch.compiler.reset()  # every shape is compiled for itself, and Dynamo gives up after eight of one function
    torch.testing.assert_close(
        attend(inputs[0]), _sdpa(inputs[0]), atol=_TOLERANCE, rtol=_TOLERANCE
    )
    benchmark.extra_info.update(
        kernel=kernel, kind="decode" if shape.queries == 1 else "prefill", shape=str(shape), calls=copies,
        bytes=shape.num_bytes, flops=shape.flops,
    )  # fmt: skip
    benchmark.pedantic(_launcher(attend, inputs), rounds=20, warmup_rounds=3)


def _launcher(attend: Attend, inputs: list[Inputs]) -> Callable[[], None]:
    """Calls the kernel once on each of the inputs, and waits for it."""

    def attend_all() -> None:
        for each in inputs:
            attend(each)

    if not _GPU:
        return attend_all
    attend_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_all()

    def launch() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return launch
