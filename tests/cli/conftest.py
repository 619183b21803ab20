"""Fixtures of the command line's tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from compiled_llm import CompiledLLM
from compiled_llm.cli import main as cli
from tests.cli.batch_helpers import Run, byte_tokenizer, generate_command
from tests.helpers.tiny_models import small_config, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=259).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[CompiledLLM]:
    config = small_config(
        compile={"dispatch": "eager"}, model={"dtype": "float32", "device": "cpu"}
    )
    with CompiledLLM.from_pretrained(model, config=config, progress=False) as engine:
        yield engine


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that completes in.jsonl into out.jsonl in the test's directory."""
    monkeypatch.chdir(tmp_path)

    def call(*options: str, model: Path | str = model) -> int:
        monkeypatch.setattr(
            sys,
            "argv",
            generate_command(model, "--prompts", "in.jsonl", "--out", "out.jsonl", *options),
        )
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return call


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a config of a tiny model in safetensors, with a single bucket."""
    directory = tmp_path_factory.mktemp("config")
    tiny_model("llama").save_pretrained(directory / "model")
    values = {
        "model": {"name": "model"},
        "limits": {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64},
        "buckets": {"decode": [], "prefill": [16], "samplers": ["greedy"]},
    }
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
