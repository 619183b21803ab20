"""Validation of requests, before anything of them reaches the device."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from compiled_llm.engine.request import Request
from compiled_llm.runtime.step.sampler import MAX_BAD_WORD_LEN, MAX_BAD_WORDS


def validate(
    request: Request, *, vocab_size: int, max_model_len: int, num_embeddings: int | None = None
) -> None:
    """Raise ValueError if the request cannot be served.

    Args:
        request: the request.
        vocab_size: number of token ids that the model generates; ids of parameters are below it.
        max_model_len: tokens of a prompt and its completion at most.
        num_embeddings: number of token ids that a prompt may hold; `vocab_size` by default.
    """
    prompt, params = request.prompt_token_ids, request.sampling_params
    if not prompt:
        raise ValueError("the prompt is empty: expected at least one token")
    if len(prompt) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, and limits.max_model_len={max_model_len} leaves "
            f"no room for output: shorten it to {max_model_len - 1} or raise the limit"
        )
    _check_prompt(prompt, vocab_size if num_embeddings is None else num_embeddings)
    _check_ids("logit_bias", params.logit_bias or (), vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_ids("bad_words", (token for word in request.bad_words for token in word), vocab_size)
    _check_bad_words(request.bad_words)
    _check_a_token_is_left(request, vocab_size)


def _check_prompt(prompt: Sequence[int], num_embeddings: int) -> None:
    # A prompt may have a hundred thousand ids, so their maximum is checked first.
    try:
        largest = int(np.frombuffer(array("I", prompt), np.uintc).max())
    except (OverflowError, TypeError):  # an id below 0 or beyond 32 bits
        largest = num_embeddings
    if largest >= num_embeddings:
        _check_ids("", prompt, num_embeddings)


def _check_ids(name: str, ids: Iterable[int], limit: int) -> None:
    """Raise ValueError for the first id out of range.

    Args:
        name: the parameter's name, or empty for the prompt.
        ids: token ids.
        limit: number of valid ids.
    """
    for token in ids:
        if not 0 <= token < limit:
            prefix = f"{name}: " if name else ""
            owner = "the model generates" if name else "the model's vocabulary has"
            raise ValueError(
                f"{prefix}token id {token} is out of range: {owner} ids 0 to {limit - 1}"
            )


def _check_bad_words(words: Sequence[Sequence[int]]) -> None:
    longest = max(map(len, words), default=0)
    if len(words) > MAX_BAD_WORDS or longest > MAX_BAD_WORD_LEN:
        raise ValueError(
            f"bad_words must be at most {MAX_BAD_WORDS} sequences of at most {MAX_BAD_WORD_LEN} "
            "tokens (each word counts once as given and once after a space), "
            f"got {len(words)} of up to {longest}"
        )


def _check_a_token_is_left(request: Request, vocab_size: int) -> None:
    """Raise ValueError if the parameters together ban every token.

    `allowed_token_ids` bans all other tokens, a bad word its last token where the preceding ones
    have come before, and `min_tokens` the stop tokens. `logit_bias` is finite and bans nothing.
    """
    params, prompt = request.sampling_params, request.prompt_token_ids
    restricted = params.allowed_token_ids is not None
    allowed = set(params.allowed_token_ids or ()) if restricted else range(vocab_size)
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
    remedies: dict[str, str] = {}
    if restricted:
        remedies["allowed_token_ids"] = "allow other tokens"
    if bad:
        remedies["bad_words"] = "ban fewer words"
    if left:
        name = f"min_tokens={params.min_tokens}"
        remedies[name] = "set min_tokens=0 or fewer stop tokens (or ignore_eos=True)"
    raise ValueError(
        f"no token is left to generate under {' and '.join(remedies)}: "
        f"{' or '.join(remedies.values())}"
    )
