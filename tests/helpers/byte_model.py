"""A tiny model of a tokenizer of bytes, its reference in transformers, and requests to it."""

import copy
import string
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.outputs import CompletionOutput, Logprob
from tests.conftest import DEVICE

VOCAB = 264
PAD, BOS, EOS = range(3)
BLOCK_SIZE = 16


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    backend = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate([*specials, *alphabet])}, merges=[]
        )
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


ASCII = encode(string.ascii_letters + string.digits + " .,!?")


NO_ASCII = [token for token in range(VOCAB) if token not in ASCII]


class Reference:
    """Generation and logprobs by transformers, with eager attention, one prompt at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)
        self._model.set_attn_implementation("eager")

    def __call__(self, prompt: Sequence[int], num_tokens: int, **options: Any) -> list[int]:
        ids = torch.tensor([list(prompt)], device=DEVICE)
        options = {
            "do_sample": False,
            "eos_token_id": None,
            "attention_mask": torch.ones_like(ids),
            **options,
        }
        tokens: list[int] = self._model.generate(ids, max_new_tokens=num_tokens, **options)[
            0, len(prompt) :
        ].tolist()
        return tokens

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits of each token, [L, V]."""
        logits: Tensor = self._model(torch.tensor([list(ids)], device=DEVICE)).logits[0].cpu()
        return logits


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **options})


def drawn(**options: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 5, "max_tokens": 12, "ignore_eos": True, **options})


def complete(llm: CompiledLLM, prompt: Any, params: SamplingParams) -> CompletionOutput:
    (output,) = llm.generate([prompt], params)
    return output.outputs[0]


def tokens_of(llm: CompiledLLM, prompts: Sequence[Sequence[int]], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(list(prompts), params)]


class Force:
    """Logits processor that forces the tokens after the prompt."""

    def __init__(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        self._start, self._tokens = len(prompt), tokens

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        forced = torch.full_like(logits, float("-inf"))
        forced[:, self._tokens[(ids.shape[1] - self._start) % len(self._tokens)]] = 0
        return forced


def spoken(
    llm: CompiledLLM, text: str, *, tokens: Sequence[int] | None = None, **options: Any
) -> CompletionOutput:
    """Return the completion of a request whose tokens are forced to be this text."""
    tokens, prompt = tokens or encode(text), "Say: "
    force = Force(encode(prompt), tokens)
    return complete(
        llm, prompt, greedy(logits_processors=[force], **{"max_tokens": len(tokens), **options})
    )


def check_logprobs(
    found: Sequence[dict[int, Logprob] | None], tokens: Sequence[int], logits: Tensor, count: int
) -> None:
    """Assert that `found` has the logprobs of each token and the `count` most likely ones."""
    assert len(found) == len(tokens) == len(logits)
    for entry, token, logprobs in zip(found, tokens, logits.double().log_softmax(-1), strict=True):
        assert entry is not None
        assert next(iter(entry)) == token
        ranked = logprobs.sort(descending=True).values
        for number, logprob in entry.items():
            expected = pytest.approx(logprob.logprob, rel=1e-4, abs=1e-5)
            assert (logprobs[number].item(), ranked[logprob.rank - 1].item()) == (
                expected,
                expected,
            )
            assert logprob.decoded_token == TOKENIZER.decode([number])
        ranks = [logprob.rank for logprob in entry.values()]
        assert sorted(ranks) == sorted({*range(1, count + 1), ranks[0]})
