"""Tokenizers that the tests of detokenization share."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from compiled_llm.models.default_model import default_model
from tests.helpers.detokenizing import BYTES, WORDS


@pytest.fixture(scope="package")
def tokenizer() -> PreTrainedTokenizerBase:
    path = default_model()
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name
    )
    return loaded


@pytest.fixture(scope="package")
def sentencepiece() -> PreTrainedTokenizerBase:
    """Return a tokenizer of words and single bytes that decodes as that of Llama 2."""
    backend = Tokenizer(
        models.WordLevel(
            {**WORDS, **{f"<0x{byte:02X}>": id for byte, id in BYTES.items()}}, unk_token="<s>"
        )
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
