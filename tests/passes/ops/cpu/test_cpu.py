"""The C++ attention kernels against attention in float64."""

import pytest
import torch

from passes.ops.paged_attention import paged_attention_cpu, paged_attention_reference
from tests.conftest import DEVICE
from tests.passes.ops.attention_cases import (
    DECODE,
    MIXED,
    NAN_SHAPES,
    SHAPES,
    Batch,
    Case,
    Options,
    check_nan,
)

pytestmark = [
    pytest.mark.usefixtures("vector_isa"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the cases' tensors are on the GPU"),
]


@pytest.mark.parametrize("lens", [DECODE[0], [1300, 64, 65, 700]], ids=["short", "long"])
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_decode(lens: list[int], shape: Options, options: Options) -> None:
    case = Case(lens, [1] * len(lens), **shape)
    actual = case.run(paged_attention_cpu, **options)
    torch.testing.assert_close(actual, case.expected(**options).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "batch", [MIXED, ([300, 64, 65, 200], [300, 64, 3, 130])], ids=["short", "long"]
)
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_prefill(batch: Batch, shape: Options, options: Options) -> None:
    """The error is at most 1.5 times that of the reference, which computes in float32 as well."""
    case = Case(*batch, **shape, pad_tokens=5)
    expected = case.expected(**options)
    actual, reference = (
        case.run(op, **options).double() for op in (paged_attention_cpu, paged_attention_reference)
    )
    assert (actual - expected).abs().max() <= 1.5 * (reference - expected).abs().max() + 1e-6


@pytest.mark.parametrize("window", [0, 90, -90])
def test_prefill_bits_do_not_depend_on_the_batch(window: int) -> None:
    """The last 40 tokens of a prompt have the same bits alone and with all before them."""
    whole, end = (Case([300], [new], heads=6) for new in (300, 40))
    end.q = whole.q[-40:]
    expected = whole.run(paged_attention_cpu, window=window)[-40:]
    assert torch.equal(end.run(paged_attention_cpu, window=window), expected)


@pytest.mark.parametrize("position", ["query", "key", "value"])
@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("shape", "options"), NAN_SHAPES)
def test_nan_propagates_to_dependent_outputs(
    batch: Batch, shape: Options, options: Options, position: str
) -> None:
    check_nan(paged_attention_cpu, batch, shape, options, position)
