"""Check that a model's tokens affect each other through attention alone.

The engine computes the tokens of several sequences in one row, so a token's logits must not depend
on the others of the row except through attention calls, which separate the sequences.
"""

from compiled_llm.errors import UnsupportedModelError
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.models.probe import alike, attend_to_self, forward_row, forward_rows, probing
from compiled_llm.models.recurrent_state import empty_state_cache

_SHORT = 8  # tokens of a sequence that is short for any model
# The largest position of a token whose logits are compared. It is large because the low frequencies
# of a rotary embedding have an effect at large positions only.
_COMPARED_POSITION = 1000


def check_token_independence(model: ServedModel, max_model_len: int) -> None:
    """Check that a token's logits depend on no other token when it attends to itself alone.

    Raises:
        UnsupportedModelError: tokens interact outside attention calls, as in a convolution;
            positions are inferred from the order in the batch; or a computation depends on the
            largest position in the batch.
    """
    kind = model.config.model_type
    reason = "a token's logits depend on the largest position in its batch"
    with probing(model, attend_to_self):
        try:
            if _independent(model, max_model_len):
                return
        except UnsupportedModelError as error:
            reason = f"its forward fails ({error.__cause__})"
        if not _independent(model, min(max_model_len, _SHORT)):
            raise UnsupportedModelError(
                f"{kind}: its tokens interact outside attention, or its positions are inferred "
                "from the order of tokens in a batch, which is not supported"
            )
        length = _longest_independent(model, max_model_len)
    # A model that remembers the longest sequence so far gives no length to recommend.
    remedy = f" to at most {length}" if length < max_model_len - 1 else ""
    raise UnsupportedModelError(
        f"{kind}: with positions up to {max_model_len - 1}, {reason}, which is not supported: "
        f"lower limits.max_model_len={max_model_len}{remedy}"
    )


def _independent(model: ServedModel, max_model_len: int) -> bool:
    """Compare a token's logits in batches with small, larger and the largest positions."""
    far = max_model_len - 1
    low, near = min(far, _SHORT - 1), min(far // 2, _COMPARED_POSITION)
    call = forward_row if empty_state_cache(model.config) is None else forward_rows
    first = call(model, [0, 0, 1], [0, 0, low])[2].float()
    second = call(model, [0, 1, 1], [0, near, low])[[1, 2]].float()
    third = call(model, [1, 2, 1], [low, far, near])[[2, 0]].float()
    return alike(second, third, model.dtype) and alike(second[1], first, model.dtype)


def _longest_independent(model: ServedModel, too_long: int) -> int:
    """Return the largest `max_model_len` below `too_long` that passes, found by bisection."""
    length = min(too_long, _SHORT)
    while too_long - length > 1:
        middle = (length + too_long) // 2
        try:
            independent = _independent(model, middle)
        except UnsupportedModelError:
            independent = False
        length, too_long = (middle, too_long) if independent else (length, middle)
    return length
