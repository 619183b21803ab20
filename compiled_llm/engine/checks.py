"""What a request must be, checked before anything of it reaches the device."""

from collections.abc import Iterable

from compiled_llm.engine.request import Request
from compiled_llm.runtime.sampling import MAX_BAD_WORD_LEN, MAX_BAD_WORDS


def check(request: Request, *, vocab_size: int, max_model_len: int) -> None:
    """Refuse what cannot be served; raises ValueError.

    Args:
        vocab_size: token ids must be below it.
        max_model_len: of the prompt and at least one token after it.
    """
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise ValueError("the prompt is empty: expected at least one token")
    if len(prompt) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, which limits.max_model_len={max_model_len} leaves no answer to: "
            f"shorten it to {max_model_len - 1} or raise the limit"
        )
    _check_ids("", prompt, vocab_size)
    _check_ids("logit_bias: ", params.logit_bias or (), vocab_size)
    _check_ids("allowed_token_ids: ", params.allowed_token_ids or (), vocab_size)
    _check_ids("bad_words: ", (token for word in request.bad_words for token in word), vocab_size)
    longest = max(map(len, request.bad_words), default=0)
    if len(request.bad_words) > MAX_BAD_WORDS or longest > MAX_BAD_WORD_LEN:
        raise ValueError(
            f"bad_words must be at most {MAX_BAD_WORDS} sequences of at most {MAX_BAD_WORD_LEN} tokens (each word is one as "
            f"it stands and one after a space), got {len(request.bad_words)} of up to {longest}"
        )


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}token id {token} is out of range: the model's vocabulary has ids 0 to {vocab_size - 1}")
