"""The default model end to end: real weights and text, Python API and command line."""

import sys
from collections.abc import Iterator

import pytest
import torch

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.cli import main as cli
from compiled_llm.config.schema import ModelConfig
from compiled_llm.models.loading import load
from tests.conftest import DEVICE
from tests.helpers.tiny_models import check_matches

CONFIG = {
    "model": {"dtype": "float32"},
    "limits": {"max_num_seqs": 2, "max_num_batched_tokens": 48, "max_model_len": 512},
    "buckets": {"decode": [2], "prefill": [48], "samplers": ["greedy"]},
}
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
]
LONG = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def llm() -> Iterator[CompiledLLM]:
    with CompiledLLM.from_pretrained(config=CONFIG, progress=False) as engine:
        yield engine


def test_tokens_equal_transformers(llm: CompiledLLM) -> None:
    loaded = load(ModelConfig(dtype="float32"))
    loaded.model.set_attn_implementation("eager")
    prompts = [*PROMPTS, LONG]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]], device=DEVICE)
        expected = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output.outputs[0].token_ids == expected[0, ids.shape[1] :].tolist()
        assert output.prompt == prompt
    report = llm.report()
    assert not report.fallbacks
    check_matches(report)


def test_chat_answers_and_stops(llm: CompiledLLM) -> None:
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0, max_tokens=40)
    (output,) = llm.chat(conversation, params)
    assert "Paris" in output.text
    assert output.outputs[0].finish_reason == "stop"
    pieces = list(llm.stream(conversation, params))
    assert "".join(pieces) == output.text
    assert len(pieces) > 3


def test_streams_split_no_character_and_can_be_closed_early(llm: CompiledLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompt = "Translate to Chinese and add emoji 🙂🙃: good morning, 早上"
    (output,) = llm.generate(prompt, params)
    pieces = list(llm.stream(prompt, params))
    assert not any("\ufffd" in piece for piece in pieces)
    assert output.text.startswith("".join(pieces))
    abandoned = llm.stream(prompt, params)
    next(abandoned)
    abandoned.close()
    assert llm.generate(prompt, params)[0].text == output.text


def test_an_empty_text_is_refused(llm: CompiledLLM) -> None:
    with pytest.raises(ValueError, match="prompt 0: the prompt is empty"):
        llm.generate("")


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compiled-llm", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_command_line_generates_and_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        f"--set={key}={value}"
        for key, value in {"compile.dispatch": "eager", "model.dtype": "float32"}.items()
    ]
    assert (
        _run(
            monkeypatch,
            "generate",
            "What is the capital of France?",
            "--max-tokens",
            "20",
            "--report",
            *overrides,
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert "Paris" in out
    assert "load weights" in err
    assert "compile.dispatch is eager" in err
    assert _run(monkeypatch, "inspect", "--start", *overrides) == 0
    assert "allocate KV cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "hi", "--set", "compile.dispath=torch"),
        ("generate", "hi", "--temperature", "-1"),
        ("generate", "hi", "--config", "/no/such/file.yaml"),
        ("generate", "hi", "--model", "/no/such/model"),
        ("generate", "", "--raw"),
        ("inspect", "--set", "limits.max_num_seqs=many"),
    ],
)
def test_the_command_line_refuses_bad_input_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert _run(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err.strip()
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
