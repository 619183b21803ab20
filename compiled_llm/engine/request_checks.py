"""What a request must be, checked before anything of it reaches the device."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from compiled_llm.engine.request import Request
from compiled_llm.runtime.step.sampler import MAX_BAD_WORD_LEN, MAX_BAD_WORDS


def check(
    request: Request, *, vocab_size: int, max_model_len: int, num_embeddings: int | None = None
) -> None:
    """Refuse what cannot be served; raises ValueError.

    Args:
        vocab_size: token ids to generate, or not to generate, must be below it.
        max_model_len: of the prompt and at least one token after it.
        num_embeddings: token ids of the prompt must be below it; `vocab_size` unless given.
    """
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise ValueError("the prompt is empty: expected at least one token")
    if len(prompt) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, which limits.max_model_len={max_model_len} leaves no answer to: "
            f"shorten it to {max_model_len - 1} or raise the limit"
        )
    _check_prompt(prompt, vocab_size if num_embeddings is None else num_embeddings)
    _check_ids("logit_bias", params.logit_bias or (), vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_ids("bad_words", (token for word in request.bad_words for token in word), vocab_size)
    longest = max(map(len, request.bad_words), default=0)
    if len(request.bad_words) > MAX_BAD_WORDS or longest > MAX_BAD_WORD_LEN:
        raise ValueError(
            f"bad_words must be at most {MAX_BAD_WORDS} sequences of at most {MAX_BAD_WORD_LEN} tokens (each word is one as "
            f"it stands and one after a space), got {len(request.bad_words)} of up to {longest}"
        )
    _check_a_token_is_left(request, vocab_size)


def _check_prompt(prompt: Sequence[int], num_embeddings: int) -> None:
    """Look at all ids at once: a prompt may have a hundred thousand."""
    try:
        largest = int(np.frombuffer(array("I", prompt), np.uintc).max())
    except (OverflowError, TypeError):  # below 0, or beyond 32 bits
        largest = num_embeddings
    if largest >= num_embeddings:
        _check_ids("", prompt, num_embeddings)


def _check_ids(name: str, ids: Iterable[int], limit: int) -> None:
    """Raise a ValueError that names the first id out of range; `name` is that of a parameter, or empty for the prompt."""
    for token in ids:
        if not 0 <= token < limit:
            where, range_of = (
                (f"{name}: ", "the model generates") if name else ("", "the model's vocabulary has")
            )
            raise ValueError(
                f"{where}token id {token} is out of range: {range_of} ids 0 to {limit - 1}"
            )


def _check_a_token_is_left(request: Request, vocab_size: int) -> None:
    """Refuse parameters that together ban every token, before the first one is drawn; raises ValueError.

    `allowed_token_ids` bans all others, a bad word its last token where the others have come before, and `min_tokens` the stop
    tokens until there are so many. `logit_bias` is finite, and bans nothing.
    """
    params, prompt = request.params, request.prompt_token_ids
    allowed = (
        range(vocab_size) if params.allowed_token_ids is None else set(params.allowed_token_ids)
    )
    bad = {
        word[-1]
        for word in request.bad_words
        if list(prompt[len(prompt) - len(word) + 1 :]) == word[:-1]
    }
    stops = request.stop_token_ids if params.min_tokens else frozenset()
    if len(allowed) > len(bad) + len(stops):
        return
    left = set(allowed) - bad
    if left - stops:
        return
    remedies = {
        "allowed_token_ids": "allow other tokens" if params.allowed_token_ids is not None else "",
        "bad_words": "ban fewer words" if bad else "",
        f"min_tokens={params.min_tokens}": "set min_tokens=0 or fewer stop tokens (or ignore_eos=True)"
        if left
        else "",
    }
    fields = " and ".join(name for name, remedy in remedies.items() if remedy)
    raise ValueError(
        f"no token is left to generate under {fields}: {' or '.join(filter(None, remedies.values()))}"
    )
