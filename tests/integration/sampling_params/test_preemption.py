"""Requests that are preempted give what they give alone."""

from collections.abc import Sequence

import pytest
from transformers import (
    RepetitionPenaltyLogitsProcessor,
)

from compiled_llm import CompiledLLM
from compiled_llm.outputs import Logprob
from tests.helpers.byte_model import ASCII, BLOCK_SIZE, TOKENIZER, VOCAB, drawn, encode, greedy
from tests.helpers.tiny_models import prompt_of, small_config, tiny_model

pytestmark = pytest.mark.gpu


def test_nothing_is_lost_where_requests_make_room() -> None:
    """Preempted requests keep their penalties, bans, logprobs, text and logits processors."""
    stops, prompts = (
        encode("ab"),
        [prompt_of(length, 3) for length in (60, 45, 10, 50, 70, 30, 14, 33)],
    )
    params = [
        drawn(
            max_tokens=40,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.2,
            logprobs=2,
        ),
        greedy(max_tokens=40, bad_words=["e", "th", "abc", "."], prompt_logprobs=2, logprobs=1),
        greedy(
            max_tokens=40, min_tokens=30, stop_token_ids=stops, logit_bias=dict.fromkeys(stops, 3.0)
        ),
        drawn(max_tokens=40, allowed_token_ids=ASCII, stop="zz", top_k=20, prompt_logprobs=0),
        greedy(max_tokens=40, frequency_penalty=2.0),
        greedy(
            max_tokens=40,
            logits_processors=[RepetitionPenaltyLogitsProcessor(1.5)],
            presence_penalty=1.0,
            logprobs=3,
        ),
        drawn(max_tokens=40, n=2, min_p=0.02, min_tokens=40, stop_token_ids=range(200)),
        drawn(max_tokens=40, temperature=3.0),
    ]
    found = []
    for memory in ("auto", 13 * BLOCK_SIZE * 2 * 2 * 2 * 16 * 4):
        config = small_config(compile={"dispatch": "eager"}, cache={"memory": memory})
        with CompiledLLM(
            tiny_model("llama", vocab_size=VOCAB), TOKENIZER, config, progress=False
        ) as llm:
            found.append(llm.generate(prompts, params))
            assert (llm.report().scheduling.preemptions > 2) == (memory != "auto")
            llm.engine.cache.check()
    for ample, tight in zip(*found, strict=True):
        assert flat(ample.prompt_logprobs or []) == pytest.approx(
            flat(tight.prompt_logprobs or []), rel=1e-4
        )
        for one, other in zip(ample.outputs, tight.outputs, strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (
                other.token_ids,
                other.text,
                other.finish_reason,
            )
            assert flat(one.logprobs or []) == pytest.approx(flat(other.logprobs or []), rel=1e-4)


def flat(logprobs: Sequence[dict[int, Logprob] | None]) -> list[float]:
    return [
        value
        for entry in logprobs
        for token, logprob in (entry or {}).items()
        for value in (token, logprob.logprob)
    ]
