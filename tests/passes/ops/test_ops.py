"""The kernels against their references, and the paged reference against plain attention on contiguous tensors."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from passes.ops import paged_attention as paged_attention_module
from passes.ops.library import define_op, use_references
from passes.ops.paged_attention import (
    paged_attention_cpu,
    paged_attention_kernel,
    paged_attention_reference,
)
from passes.ops.write_kv import write_kv_kernel, write_kv_reference
from tests.conftest import DEVICE


class Case:
    """A ragged batch over a scattered cache in which everything that must not be read is NaN."""

    def __init__(
        self, lens: list[int], new: list[int], *, heads: int = 4, kv_heads: int = 2, dim: int = 32, value_dim: int | None = None,
        block_size: int = 16, dtype: torch.dtype = torch.float32, sinks: bool = False,
        slopes: bool = False, pad_tokens: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        value_dim = value_dim or dim
        max_blocks = max(1, *(-(-n // block_size) for n in lens)) + 1
        num_pages = 1 + max_blocks * len(lens) + 2
        pages = list(range(1, num_pages))
        random.Random(0).shuffle(pages)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.k_cache = torch.full(
            (num_pages, block_size, kv_heads, dim), float("nan"), dtype=dtype, device=DEVICE
        )
        self.v_cache = torch.full(
            (num_pages, block_size, kv_heads, value_dim), float("nan"), dtype=dtype, device=DEVICE
        )
        self.table = torch.zeros(len(lens), max_blocks, dtype=torch.int32, device=DEVICE)
        self.keys, self.values = [], []
        for s, length in enumerate(lens):
            keys, values = rand(length, kv_heads, dim), rand(length, kv_heads, value_dim)
            for i in range(0, length, block_size):
                page = pages.pop()
                self.table[s, i // block_size] = page
                part = slice(i, min(i + block_size, length))
                self.k_cache[page, : part.stop - i] = keys[part]
                self.v_cache[page, : part.stop - i] = values[part]
            self.keys.append(keys)
            self.values.append(values)
        self.lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        self.starts = torch.tensor(
            [0, *itertools.accumulate(new)], dtype=torch.int32, device=DEVICE
        )
        # Heads before tokens in memory, as a model leaves them: the ops must honour strides.
        self.q = rand(heads, sum(new) + pad_tokens, dim).transpose(0, 1)
        self.sinks = rand(heads) if sinks else None
        self.slopes = torch.rand(heads, generator=generator).to(DEVICE) if slopes else None
        self.split_counters = torch.zeros(len(lens) * kv_heads, dtype=torch.int32, device=DEVICE)

    def run(self, op, *, scale=0.3, window=0, softcap=0.0, max_query_len=None):  # type: ignore[no-untyped-def]
        most = (
            int((self.starts[1:] - self.starts[:-1]).max())
            if max_query_len is None
            else max_query_len
        )
        options = (self.sinks, self.slopes, scale, window, softcap, most)
        return op(
            self.q,
            self.k_cache,
            self.v_cache,
            self.table,
            self.starts,
            self.lens,
            self.split_counters,
            *options,
        )

    def plain(self, *, scale: float = 0.3, window: int = 0, softcap: float = 0.0) -> Tensor:
        """Attention in float64 on contiguous tensors, a token at a time."""
        out = torch.zeros(
            self.q.shape[0],
            self.q.shape[1],
            self.v_cache.shape[-1],
            dtype=torch.float64,
            device=DEVICE,
        )
        repeat = self.q.shape[1] // self.k_cache.shape[2]
        for s, (begin, end) in enumerate(itertools.pairwise(self.starts.tolist())):
            for token in range(begin, end if self.lens[s] else begin):
                position = int(self.lens[s]) - (end - token)
                first = (
                    max(0, position - window + 1)
                    if window > 0
                    else position // -window * -window
                    if window
                    else 0
                )
                keys = self.keys[s][first : position + 1].double().repeat_interleave(repeat, 1)
                values = self.values[s][first : position + 1].double().repeat_interleave(repeat, 1)
                scores = torch.einsum("hd,khd->hk", self.q[token].double(), keys) * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                if self.slopes is not None:
                    scores += self.slopes.double()[:, None] * torch.arange(
                        first - position, 1, device=DEVICE
                    )
                if self.sinks is not None:
                    scores = torch.cat([scores, self.sinks.double()[:, None]], 1)
                out[token] = torch.einsum("hk,khd->hd", scores.softmax(-1)[:, : len(keys)], values)
        return out


MIXED = ([40, 7, 0, 33, 1, 100], [40, 1, 0, 5, 1, 37])
DECODE = ([40, 7, 0, 33, 16, 100], [1, 1, 1, 1, 1, 1])
# Triton's interpreter computes with numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
SHAPES = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"heads": 9, "kv_heads": 3, "dim": 64}, {}, id="group-of-3"),
    pytest.param({"heads": 7, "kv_heads": 1, "dim": 80, "value_dim": 48}, {}, id="odd-dims"),
    pytest.param({"heads": 2, "kv_heads": 2, "dim": 256, "block_size": 32}, {}, id="wide-head"),
    pytest.param({"block_size": 128}, {"window": 9}, id="window"),
    pytest.param({}, {"window": -9}, id="chunks"),
    pytest.param({}, {"softcap": 2.0}, id="softcap"),
    pytest.param({"sinks": True}, {"window": 20, "softcap": 5.0}, id="sinks-window-softcap"),
    pytest.param({"heads": 6, "slopes": True}, {}, id="slopes"),
    pytest.param({"slopes": True}, {"window": 20}, id="slopes-window"),
]


@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_reference_is_plain_attention(batch, shape, options) -> None:  # type: ignore[no-untyped-def]
    case = Case(*batch, **shape)
    torch.testing.assert_close(
        case.run(paged_attention_reference, **options),
        case.plain(**options).float(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_kernel_is_the_reference(batch, shape, options, dtype) -> None:  # type: ignore[no-untyped-def]
    case = Case(*batch, **shape, dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    expected = case.plain(**options)
    actual = case.run(paged_attention_kernel, **options).double()
    assert torch.isfinite(actual).all()
    assert not case.split_counters.any()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("vector_isa")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="tensors are made on the GPU here")
@pytest.mark.parametrize("lens", [DECODE[0], [1300, 64, 65, 700]], ids=["short", "long"])
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_cpp_decode_is_the_reference(lens, shape, options) -> None:  # type: ignore[no-untyped-def]
    case = Case(lens, [1] * len(lens), **shape)
    actual = case.run(paged_attention_cpu, **options)
    torch.testing.assert_close(actual, case.plain(**options).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("vector_isa")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="tensors are made on the GPU here")
@pytest.mark.parametrize(
    "batch", [MIXED, ([300, 64, 65, 200], [300, 64, 3, 130])], ids=["short", "long"]
)
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_cpp_prefill_is_the_reference(batch, shape, options) -> None:  # type: ignore[no-untyped-def]
    """As near to attention in float64 as the reference in float32 is, but for half of that."""
    case = Case(*batch, **shape, pad_tokens=5)
    expected = case.plain(**options)
    actual, reference = (
        case.run(op, **options).double() for op in (paged_attention_cpu, paged_attention_reference)
    )
    assert (actual - expected).abs().max() <= 1.5 * (reference - expected).abs().max() + 1e-6


@pytest.mark.usefixtures("vector_isa")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="tensors are made on the GPU here")
@pytest.mark.parametrize("window", [0, 90, -90])
def test_cpp_prefill_does_not_depend_on_what_shares_the_step(window: int) -> None:
    """Bit for bit: the last 40 tokens of a prompt, alone and with all before them."""
    whole, end = (Case([300], [new], heads=6) for new in (300, 40))
    end.q = whole.q[-40:]
    assert torch.equal(
        whole.run(paged_attention_cpu, window=window)[-40:],
        end.run(paged_attention_cpu, window=window),
    )


SPOILED = [pytest.param(what, id=what) for what in ("query", "key", "value")]
NAN_SHAPES = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"sinks": True, "slopes": True}, {"softcap": 2.0}, id="all"),
]


def _check_nan(operation, batch, shape, options, spoiled: str) -> None:  # type: ignore[no-untyped-def]
    """NaN in a query, or in the key or value of one of the last sequence's first tokens, reaches what reads it and nothing else."""
    case = Case(*batch, **shape)
    token, group, feature = 3, 1, 7
    page = case.table[-1, 0]
    if spoiled == "query":
        case.q[-1, 1, feature] = float("nan")
    elif spoiled == "key":
        case.k_cache[page, token, group, feature] = case.keys[-1][token, group, feature] = float(
            "nan"
        )
    else:
        case.v_cache[page, token, group, feature] = case.values[-1][token, group, feature] = float(
            "nan"
        )
    expected = case.plain(**options).float()
    assert 0 < expected.isnan().sum() < expected.numel() / 2
    torch.testing.assert_close(
        case.run(operation, **options), expected, rtol=1e-4, atol=1e-5, equal_nan=True
    )


@pytest.mark.gpu
@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("shape", "options"), NAN_SHAPES)
@pytest.mark.parametrize("operation", [paged_attention_reference, paged_attention_kernel])
def test_nan_reaches_what_reads_it(operation, batch, shape, options, spoiled) -> None:  # type: ignore[no-untyped-def]
    _check_nan(operation, batch, shape, options, spoiled)


@pytest.mark.usefixtures("vector_isa")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="tensors are made on the GPU here")
@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("shape", "options"), NAN_SHAPES)
def test_nan_reaches_what_reads_it_in_cpp(batch, shape, options, spoiled) -> None:  # type: ignore[no-untyped-def]
    _check_nan(paged_attention_cpu, batch, shape, options, spoiled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lens", [[1300, 64, 65, 127, 128, 129, 700], [2000]], ids=["ragged", "one"]
)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"sinks": True}, {"softcap": 3.0}),
        ({}, {"window": 300}),
        ({}, {"window": -300}),
        ({"slopes": True}, {}),
    ],
)
def test_decode_splits_long_sequences(lens, shape, options, dtype) -> None:  # type: ignore[no-untyped-def]
    """Twice, because the second launch finds what the first one left behind."""
    case = Case(lens, [1] * len(lens), **shape, dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    expected = case.plain(**options)
    for _ in range(2):
        torch.testing.assert_close(
            case.run(paged_attention_kernel, **options).double(),
            expected,
            rtol=tolerance,
            atol=tolerance,
        )
        assert not case.split_counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("operation", [paged_attention_reference, paged_attention_kernel])
def test_padding_is_zero(operation) -> None:  # type: ignore[no-untyped-def]
    mixed, decode = Case(*MIXED, pad_tokens=3), Case(*DECODE)
    assert not mixed.run(operation)[-3:].any()
    assert not decode.run(operation)[2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("operation", [write_kv_reference, write_kv_kernel])
def test_write_kv_touches_its_slots_alone(operation) -> None:  # type: ignore[no-untyped-def]
    k, v = (
        torch.randn(2, 5, 80, device=DEVICE).transpose(0, 1),
        torch.randn(2, 5, 48, device=DEVICE).transpose(0, 1),
    )
    k_cache, v_cache = (
        torch.zeros(4, 16, 2, 80, device=DEVICE),
        torch.zeros(4, 16, 2, 48, device=DEVICE),
    )
    slots = torch.tensor([17, 63, 20, 48, 31], device=DEVICE)
    operation(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.view(64, 2, 80)[slots], k)
    assert torch.equal(v_cache.view(64, 2, 48)[slots], v)
    others = [slot for slot in range(64) if slot not in slots.tolist()]
    assert not k_cache.view(64, 2, 80)[others].any()
    assert not v_cache.view(64, 2, 48)[others].any()


def test_within_references_ops_run_their_references() -> None:
    """In the thread that wants them alone, and until it is out of all of them."""
    op = define_op(
        "test_choice(Tensor x) -> Tensor",
        reference=lambda x: x + 1,
        kernel=lambda x: x + 2,
        cpu=lambda x: x + 2,
        fake=torch.empty_like,
    )
    x = torch.zeros(1, device=DEVICE)

    def value() -> int:
        return int(op(x))

    assert value() == 2
    with use_references(), ThreadPoolExecutor(1) as others:
        assert value() == 1
        assert others.submit(value).result() == 2
        with pytest.raises(KeyError), use_references():
            raise KeyError
        assert value() == 1
    assert value() == 2


@pytest.mark.parametrize("max_query_len", [1, 40])
@pytest.mark.parametrize("window", [0, 24, -32])
def test_the_attention_reference_is_the_same_in_pieces(
    window: int, max_query_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([70, 0, 45, 9], dtype=torch.int32)
    counts = (
        (lengths > 0).int()
        if max_query_len == 1
        else torch.tensor([40, 0, 7, 9], dtype=torch.int32)
    )
    starts = (
        torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
        if max_query_len > 1
        else torch.arange(5).int()
    )
    q = torch.randn(4 if max_query_len == 1 else 60, 4, 16)  # the last tokens are of no sequence
    k_cache, v_cache = torch.randn(21, 16, 2, 16), torch.randn(21, 16, 2, 16)
    table = (torch.randperm(20)[:20] + 1).view(4, 5).int()
    arguments = (
        q,
        k_cache,
        v_cache,
        table,
        starts,
        lengths,
        torch.zeros(16).int(),
        None,
        None,
        0.25,
        window,
        0.0,
        max_query_len,
    )
    whole = paged_attention_reference(*arguments)
    monkeypatch.setattr(paged_attention_module, "_MAX_ELEMENTS", 70 * 4 * 3)
    torch.testing.assert_close(paged_attention_reference(*arguments), whole)
