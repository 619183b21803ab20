"""Tests of loading checkpoints: models, tokenizers, random weights and refusals."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.config.schema import ModelConfig
from compiled_llm.models import loading
from compiled_llm.models.loading import load
from tests.helpers.tiny_models import small_config, tiny_model


def test_a_directory_with_safetensors(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    loaded = load(ModelConfig(name=str(tmp_path), dtype="float32"))
    assert loaded.tokenizer is loaded.tokenizer_failure is None
    assert not loaded.model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer.json": "{broken"}, "JSONDecodeError: Expecting property name"),
        ({"tokenizer.json": "{}"}, "KeyError: 'added_tokens'"),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
            "ValueError: its files hold no vocabulary",
        ),
        ({"tekken.json": "{}"}, ""),
    ],
    ids=["broken", "empty", "without a vocabulary", "of another library"],
)
def test_the_reason_for_a_missing_tokenizer_is_returned(
    tmp_path: Path, files: dict[str, str], reason: str
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.warns(
        UserWarning,
        match=f"the tokenizer in {tmp_path} cannot be loaded, so prompts must be token ids: ",
    ) as caught:
        loaded = load(ModelConfig(name=str(tmp_path)))
    assert loaded.tokenizer is None
    assert loaded.tokenizer_failure is not None
    assert loaded.tokenizer_failure.startswith(reason)
    assert any(str(warning.message).endswith(loaded.tokenizer_failure) for warning in caught)


@pytest.mark.filterwarnings("ignore:the tokenizer in")
def test_the_reason_is_reported_and_in_later_errors(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    config = small_config(compile={"dispatch": "eager"}, model={"name": str(tmp_path)})
    with CompiledLLM.from_pretrained(config=config, progress=False) as llm:
        (warning,) = [text for text in llm.report().warnings if "tokenizer" in text]
        assert warning.startswith(
            "the tokenizer cannot be loaded, so prompts must be token ids: JSONDecodeError: "
        )
        for call in (
            lambda: llm.generate("a"),
            lambda: llm.stream("a"),
            lambda: llm.chat([{"role": "user", "content": "a"}]),
            lambda: llm.generate([5], SamplingParams(stop="a")),
            lambda: llm.generate([5], SamplingParams(bad_words=["a"])),
        ):
            with pytest.raises(
                ValueError, match=r"this model has no tokenizer \(JSONDecodeError: .*\): "
            ):
                call()


def test_a_tokenizer_is_loaded_without_a_warning(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load(ModelConfig(name=str(tmp_path)))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("a")["input_ids"] == [1]
    assert loaded.tokenizer_failure is None


def test_random_weights_are_seeded_and_leave_the_global_generator_alone(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    models = [
        load(ModelConfig(name=str(tmp_path / "config.json"), weights="random", seed=seed)).model
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (model.get_input_embeddings().weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_invalid_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    tiny_model("llama").config.save_pretrained(tmp_path / "bare")
    for name in ("broken", "nameless"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    tiny_model("llama").config.save_pretrained(tmp_path / "broken")
    (tmp_path / "notes.txt").write_text("")
    for config, message in [
        (
            ModelConfig(name=str(tmp_path / "bare")),
            r"holds no \*.safetensors: add the weights, or set model.weights=random",
        ),
        (ModelConfig(name=str(tmp_path / "broken")), "cannot be loaded"),
        (ModelConfig(name=str(tmp_path / "nameless")), "cannot be read: Unrecognized model"),
        (ModelConfig(name=str(tmp_path / "notes.txt")), "is a file but not a .gguf"),
        (ModelConfig(name=str(tmp_path / "absent")), "is neither an existing path nor a hub id"),
        (ModelConfig(weights="random"), "needs model.name"),
        (ModelConfig(name=str(tmp_path / "notes.txt"), weights="random"), "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load(config)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        load(ModelConfig(device="cuda"))


def test_a_revision_is_passed_on_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def refuse(name: str, revision: str | None = None, **_: object) -> None:
        asked.append((name, revision))
        raise OSError("there is no network here")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", refuse)
    for weights in ("auto", "random"):
        config = ModelConfig.model_validate(
            {"name": "owner/model", "revision": "abc123", "weights": weights}
        )
        with pytest.raises(ValueError, match="there is no network here"):
            load(config)
    assert asked == [("owner/model", "abc123")] * 2


def test_a_revision_of_local_files_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    for config in [
        ModelConfig(name=str(tmp_path), revision="main"),
        ModelConfig(name=str(tmp_path / "a.gguf"), revision="main"),
        ModelConfig(name=str(tmp_path / "config.json"), revision="main", weights="random"),
        ModelConfig(revision="main"),
    ]:
        with pytest.raises(
            ValueError,
            match=r"model.revision=main names a version of a hub id, but .* is a local path: "
            r"drop model.revision",
        ):
            load(config)


def test_shards_and_tied_weights(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load(ModelConfig(name=str(tmp_path), dtype="float32")).model
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


_LOAD_IN_LITTLE = """
import resource, sys, torch
from pathlib import Path
from compiled_llm.config.schema import ModelConfig
from compiled_llm.models.loading import load
lines = Path("/proc/self/status").read_text().splitlines()
data = next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
limit = data * 1024 + int(float(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
model = load(ModelConfig(name=sys.argv[1], dtype="bfloat16", device="cpu")).model
assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_16_bit_weights_are_not_in_memory_twice(tmp_path: Path) -> None:
    """They load with memory for one and a half times their size."""
    model = tiny_model("llama", hidden_size=1024, intermediate_size=16384, vocab_size=32000).to(
        torch.bfloat16
    )
    num_bytes = sum(parameter.numel() * 2 for parameter in model.parameters())
    assert num_bytes > 300e6
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    del model
    command = [sys.executable, "-c", _LOAD_IN_LITTLE, str(tmp_path), str(1.5 * num_bytes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
