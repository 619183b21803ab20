"""Benchmarks of paged attention, and of torch's sdpa and flex_attention on contiguous tensors.

    pytest bench/kernels.py    # `compiled-llm bench kernels` prints the rates

On a GPU a measurement replays a CUDA graph of several calls on different tensors, so that keys are
not in the L2 cache and launches are not timed; the sizes are those of the suite's models. On a CPU
the reference implementation runs, on tiny sizes.
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
DEVICE = "cuda" if _GPU else "cpu"
DTYPE = torch.bfloat16 if _GPU else torch.float32
_PAGE = 16
_L2_BYTES = 128 * 2**20  # more than the L2 cache of any GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of one attention call.

    Attributes:
        sequences: number of sequences.
        queries: number of new tokens of each sequence.
        length: number of tokens of each sequence, new ones included.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        dim: head dim.
    """

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
        """Return the bytes of keys, values, queries and outputs, each counted once."""
        kv_rows = self.length * self.kv_heads
        query_rows = self.queries * self.heads
        return 2 * self.sequences * (kv_rows + query_rows) * self.dim * DTYPE.itemsize

    @property
    def flops(self) -> int:
        """Return the operations of both matrix products under a causal mask."""
        pairs = self.queries * (2 * self.length - self.queries + 1) // 2
        return 4 * self.sequences * pairs * self.heads * self.dim


def _shapes() -> tuple[list[Shape], list[Shape]]:
    """Return the shapes for decode and for prefill."""
    if not _GPU:
        sizes = {"heads": 4, "kv_heads": 2, "dim": 32}
        tiny_decode = Shape(sequences=2, queries=1, length=64, **sizes)
        tiny_prefill = Shape(sequences=1, queries=32, length=32, **sizes)
        return [tiny_decode], [tiny_prefill]
    decode: list[Shape] = []
    prefill: list[Shape] = []
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
    """Inputs of one call, with keys and values both contiguous and in pages.

    Attributes:
        shape: S sequences of Q queries and K keys, H query heads, G key heads, head dim D.
        q: queries [S, H, Q, D].
        flat_q: the same queries [S * Q, H, D].
        k, v: contiguous keys and values [S, G, K, D].
        k_cache, v_cache: the same keys and values in pages [P, B, G, D].
        block_table: int32 [S, N], pages of each sequence.
        query_start: int32 [S + 1], first query of each sequence.
        seq_lens: int32 [S], tokens of each sequence.
        split_counters: int32 [S * G] zeros, workspace of the decode kernel.
    """

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
        """Return random inputs, with pages in random order."""
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


# Returns outputs [S, H, Q, D].
Attend = Callable[[Inputs], Tensor]


def _paged(inputs: Inputs) -> Tensor:
    shape = inputs.shape
    out_THD: Tensor = paged_attention(
        inputs.flat_q, inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.query_start,
        inputs.seq_lens, inputs.split_counters, None, None, shape.dim**-0.5, 0, 0.0, shape.queries,
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
    # Compilation takes half a minute on a CPU.
    return torch.compile(flex_attention, dynamic=False) if _GPU else flex_attention


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
    torch.compiler.reset()  # each shape is recompiled, and Dynamo has a limit on recompilations
    torch.testing.assert_close(
        attend(inputs[0]), _sdpa(inputs[0]), atol=_TOLERANCE, rtol=_TOLERANCE
    )
    benchmark.extra_info.update(
        kernel=kernel,
        kind="decode" if shape.queries == 1 else "prefill",
        shape=str(shape),
        calls=copies,
        bytes=shape.num_bytes,
        flops=shape.flops,
    )
    benchmark.pedantic(_launcher(attend, inputs), rounds=20, warmup_rounds=3)


def _launcher(attend: Attend, inputs: list[Inputs]) -> Callable[[], None]:
    """Return a function that runs the kernel on each of the inputs and synchronizes."""

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
