"""Which differences make a bucket fail."""

import torch

from compiled_llm.runtime.verify.comparison import Comparison


def _with_errors(errors: list[float], *, allowed: float) -> Comparison:
    by_token = torch.tensor(errors)
    return Comparison(allowed=allowed, token_errors=[by_token], row_errors=[by_token])


def test_a_share_of_the_tokens_may_differ() -> None:
    """A router in 16 bits may send them to other experts."""
    errors = [0.1] * 10 + [2.0] * 2
    comparison = _with_errors(errors, allowed=1.0)
    assert comparison.failure(0.25) is None
    assert str(comparison.failure(0.0)).startswith(
        "2 of 12 tokens differ from eager, by up to 2 standard deviations"
    )
    comparison = _with_errors(errors, allowed=0.05)
    assert str(comparison.failure(0.25)).startswith("12 of 12 tokens")


def test_a_mistake_fails_whatever_the_differences() -> None:
    comparison = _with_errors([0.0], allowed=1.0)
    comparison.mistakes += ["it set wrong positions", "it set wrong positions"]
    assert comparison.failure(1.0) == "it set wrong positions"


def test_the_result_sums_up_all_batches() -> None:
    comparison = _with_errors([0.1, 0.3], allowed=1.0)
    comparison.token_errors.append(torch.tensor([0.5]))
    comparison.rows, comparison.agreeing = 4, 3
    result = comparison.result(0.0)
    assert (result.batches, result.rows, result.agreement) == (2, 4, 0.75)
    assert (comparison.num_tokens, result.error, result.failure) == (3, 0.5, None)
