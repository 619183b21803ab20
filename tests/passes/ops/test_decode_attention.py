"""The decode kernel, where the keys of a sequence are split between programs."""

import pytest
import torch

from passes.ops.paged_attention import paged_attention_kernel
from tests.passes.ops.attention_cases import DTYPES, TOLERANCES, Case, Options

LONG = [1300, 64, 65, 127, 128, 129, 700]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lens", [LONG, [2000]], ids=["ragged", "one"])
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
def test_splits_of_long_sequences(
    lens: list[int], shape: Options, options: Options, dtype: torch.dtype
) -> None:
    """The kernel is launched twice, because the second launch uses the counters of the first."""
    case = Case(lens, [1] * len(lens), **shape, dtype=dtype)
    tolerance = TOLERANCES[dtype]
    expected = case.expected(**options)
    for _ in range(2):
        actual = case.run(paged_attention_kernel, **options).double()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        assert not case.split_counters.any()
