"""Helpers of the tests of batches: files of prompts and results, and commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

OVERRIDES = {
    "compile.dispatch": "eager",
    "model.device": "cpu",
    "model.dtype": "float32",
    "limits.max_num_seqs": "4",
    "limits.max_num_batched_tokens": "48",
    "limits.max_model_len": "128",
}


Run = Callable[..., int]


Lines = list[dict[str, Any]]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte and three special ones."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message.role == 'fool' %}{{ raise_exception('no fools') }}{% endif %}"
        "<s>{{ message.content }}</s>{% endfor %}"
    )
    return tokenizer


def generate_command(model: Path | str, *options: str) -> list[str]:
    sets = [f"--set={key}={value}" for key, value in OVERRIDES.items()]
    return ["compiled-llm", "generate", "--model", str(model), "--max-tokens", "6", *options, *sets]


def write_lines(path: str | Path, *lines: object) -> None:
    Path(path).write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )


def read_lines(path: str | Path) -> Lines:
    text = Path(path).read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def token_ids_by_id(lines: Lines) -> dict[Any, list[list[int]]]:
    """Return the tokens of each line by its id; check that ids are unique."""
    found = {line["id"]: [output["token_ids"] for output in line["outputs"]] for line in lines}
    assert len(found) == len(lines)
    return found
