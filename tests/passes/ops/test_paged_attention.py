"""Paged attention: the reference against attention in float64, and kernels against that."""

import pytest
import torch

from passes.ops import paged_attention as paged_attention_module
from passes.ops.paged_attention import paged_attention_kernel, paged_attention_reference
from tests.passes.ops.attention_cases import (
    DECODE,
    DTYPES,
    MIXED,
    NAN_SHAPES,
    SHAPES,
    TOLERANCES,
    Batch,
    Case,
    Operation,
    Options,
    check_nan,
)


@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_reference(batch: Batch, shape: Options, options: Options) -> None:
    case = Case(*batch, **shape)
    actual = case.run(paged_attention_reference, **options)
    expected = case.expected(**options).float()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_kernel(batch: Batch, shape: Options, options: Options, dtype: torch.dtype) -> None:
    case = Case(*batch, **shape, dtype=dtype)
    tolerance = TOLERANCES[dtype]
    expected = case.expected(**options)
    actual = case.run(paged_attention_kernel, **options).double()
    assert torch.isfinite(actual).all()
    assert not case.split_counters.any()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("position", ["query", "key", "value"])
@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("shape", "options"), NAN_SHAPES)
@pytest.mark.parametrize("op", [paged_attention_reference, paged_attention_kernel])
def test_nan_propagates_to_dependent_outputs(
    op: Operation, batch: Batch, shape: Options, options: Options, position: str
) -> None:
    check_nan(op, batch, shape, options, position)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [paged_attention_reference, paged_attention_kernel])
def test_padding_is_zero(op: Operation) -> None:
    mixed, decode = Case(*MIXED, pad_tokens=3), Case(*DECODE)
    assert not mixed.run(op)[-3:].any()
    assert not decode.run(op)[2].any()


@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("window", [0, 24, -32])
def test_reference_in_slices(batch: Batch, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on intermediate tensors is reached within a sequence and between sequences."""
    case = Case(*batch, pad_tokens=0 if batch is DECODE else 3)
    whole = case.run(paged_attention_reference, window=window)
    monkeypatch.setattr(paged_attention_module, "_MAX_ELEMENTS", 100 * 4 * 3)
    torch.testing.assert_close(case.run(paged_attention_reference, window=window), whole)
