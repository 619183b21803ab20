"""Text is streamed in complete characters, and stop strings are cut."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compiled_llm import AsyncCompiledLLM, CompiledLLM, SamplingParams
from compiled_llm.sampling_params import LogitsProcessor
from tests.helpers.async_engine import (
    EAGER,
    LONG,
    free_blocks,
    last,
    spelling,
)
from tests.helpers.letters import Letters
from tests.helpers.tiny_models import Reference, prompt_of, small_config, tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with a token for each byte, from 3 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(
            vocab={character: 3 + number for number, character in enumerate(alphabet)}, merges=[]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def speaking(tokenizer: PreTrainedTokenizerBase) -> Iterator[AsyncCompiledLLM]:
    model, config = tiny_model("llama", vocab_size=300), small_config(compile=EAGER)
    engine = AsyncCompiledLLM(lambda: CompiledLLM(model, tokenizer, config, progress=False))
    yield engine
    engine.close()


def saying(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, **params: Any
) -> SamplingParams:
    """Return parameters that force this answer."""
    begin, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(answer)["input_ids"]

    def force(known: torch.LongTensor, logits: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(logits, float("-inf"))
        forced[:, ids[known.shape[1] - begin]] = 0
        return forced  # type: ignore[return-value]

    processors: list[LogitsProcessor] = [force]
    return SamplingParams(
        temperature=0, max_tokens=len(ids), logits_processors=processors, **params
    )


def test_text_comes_in_whole_characters_and_stays(
    speaking: AsyncCompiledLLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    answer, kept = "Grüße 🙂 an ST und STO, STOP: nicht mehr", "Grüße 🙂 an ST und STO, "
    params = saying(tokenizer, "Hallo", answer, stop="STOP")

    async def main() -> tuple[list[str], list[str], str, str]:
        pieces = [piece async for piece in speaking.stream("Hallo", params)]
        texts = [output.text async for output in speaking.generate("Hallo", params)]
        alone = await last(await speaking.add_request("Hallo", params, streaming=False))
        whole = await last(speaking.generate("Hallo", saying(tokenizer, "Hallo", answer)))
        return pieces, texts, alone.text, whole.text

    pieces, texts, alone, whole = asyncio.run(main())
    assert "".join(pieces) == texts[-1] == alone == kept
    assert whole == answer
    assert len(pieces) > 5
    assert all(kept.startswith(text) for text in texts)
    assert "\ufffd" not in "".join(texts)
    with pytest.raises(
        ValueError, match=r"stream\(\) yields one completion, got n=2: use generate\(\)"
    ):
        asyncio.run(anext(speaking.stream("Hallo", SamplingParams(n=2))))


def test_many_streams_of_text_at_once(
    speaking: AsyncCompiledLLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = [f"{number}: " + "äöü🙂ß" * (number % 4 + 1) for number in range(12)]

    async def read(number: int, answer: str) -> str:
        prompt = f"Frage {number}"
        return "".join(
            [piece async for piece in speaking.stream(prompt, saying(tokenizer, prompt, answer))]
        )

    async def main() -> list[str]:
        return await asyncio.gather(
            *(read(number, answer) for number, answer in enumerate(answers))
        )

    assert asyncio.run(main()) == answers


class NoLetters(Letters):
    """Tokenizer that fails for one of its tokens."""

    def decode(self, ids: list[int], **_: object) -> str:
        if 7 in ids:
            raise ValueError("no text for 7")
        return super().decode(ids)


def test_tokens_that_the_tokenizer_does_not_know_have_no_text(reference: Reference) -> None:
    async def main() -> None:
        async with spelling(Letters()) as llm:
            outputs = await asyncio.gather(
                last(llm.generate(prompt_of(20), LONG)),
                last(
                    llm.generate(
                        prompt_of(9),
                        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=3),
                    )
                ),
                last(
                    llm.generate(
                        prompt_of(30),
                        SamplingParams(
                            temperature=0, max_tokens=9, prompt_logprobs=3, ignore_eos=True
                        ),
                    )
                ),
            )
            for output, (length, count) in zip(outputs, [(20, 100), (9, 9), (30, 9)], strict=True):
                expected = reference(prompt_of(length), count)
                assert (output.outputs[0].token_ids, output.outputs[0].error) == (expected, None)
                assert output.text == "".join(chr(97 + token) for token in expected if token < 26)
            for entry in [
                *(outputs[1].outputs[0].logprobs or []),
                *(outputs[2].prompt_logprobs or [])[1:],
            ]:
                assert entry is not None
                assert all(
                    one.decoded_token == (chr(97 + token) if token < 26 else "")
                    for token, one in entry.items()
                )

    asyncio.run(main())


def test_a_tokenizer_that_fails_ends_its_request_alone(reference: Reference) -> None:
    prompt = [*prompt_of(20), 7, 5, 6, 8, 4, 3, 9, 10, 11]  # none of the last tokens fails

    async def main() -> None:
        async with spelling(NoLetters()) as llm:
            before = await free_blocks(llm)
            other = await llm.add_request(prompt_of(9), LONG, streaming=False)
            failing = SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=0)
            output = await last(await llm.add_request(prompt, failing))
            assert (output.outputs[0].finish_reason, output.outputs[0].error) == (
                "error",
                "ValueError: no text for 7",
            )
            assert (await last(other)).outputs[0].token_ids == reference(prompt_of(9), 100)
            assert await free_blocks(llm) == before

    asyncio.run(main())
