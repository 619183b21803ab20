"""Tests of the command line: bad input and interrupts."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bench.cli
from compiled_llm import CompiledLLM
from compiled_llm.cli import main as cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate", "expected either a prompt or --prompts, got neither"),
        ("generate a --config {dir}", "config file {dir} cannot be read: Is a directory"),
        (
            "generate a --config {dir}/latin.yaml",
            "config file {dir}/latin.yaml cannot be read: it is not UTF-8",
        ),
        (
            "generate a --set buckets.decode=[1,2",
            "override 'buckets.decode=[1,2' is not valid YAML",
        ),
        ("generate a --set model={", "override 'model={' is not valid YAML"),
        (
            "generate a --config {dir}/parent.yaml",
            "config file {dir}/parent.yaml: extends must be the path of one other config",
        ),
        ("generate a --model {dir}", "model directory '{dir}' holds no *.safetensors"),
        (
            "generate a --model=",
            "config key 'model.name': String should have at least 1 character, got ''",
        ),
        ("generate --prompts {dir} --out {dir}/out", "{dir} cannot be read: Is a directory"),
        (
            "generate --prompts {dir}/latin.yaml --out {dir}/out",
            "{dir}/latin.yaml:1: expected JSON in UTF-8",
        ),
        (
            "generate --prompts {dir}/prompts --out {dir}/none/out",
            "{dir}/none/out cannot be written: No such file or directory",
        ),
        ("generate a --report-file {dir}/report", "a report file must end in .html, .json, .txt"),
        ("generate a --max-tokens=few", "Invalid value for '--max-tokens': "),
        ("generate a --max-tokenss=4", "No such option: --max-tokenss"),
        ("inspect {dir}/none", "model '{dir}/none' is neither an existing path nor a hub id"),
        (
            "verify {dir}/none.yaml",
            "config file {dir}/none.yaml cannot be read: No such file or directory",
        ),
        ("compile", "Missing argument "),
        ("explain {dir} {dir}", "{dir} has no complete manifest"),
        ("buckets suggest {dir}/none", "{dir}/none has no record of traffic"),
        ("exlain", "No such command 'exlain'"),
        ("bench latency --batch=x", "--batch 'x': expected positive numbers separated by commas"),
        ("bench latency --rounds=x", "Invalid value for '--rounds'"),
        ("bench latency --config {dir}", "config file {dir} cannot be read: Is a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"\xe4\n")
    (tmp_path / "parent.yaml").write_text("extends: 3\n")
    (tmp_path / "prompts").write_text('"a"\n')
    words = [word.format(dir=tmp_path) if word != "model={" else word for word in arguments.split()]
    assert _status(cli, words, monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: " + message.replace("{dir}", str(tmp_path)))
    assert (printed.err.count("\n"), printed.out) == (1, "")
    if words[0] == "bench":
        assert _status(bench.cli, words[1:], monkeypatch) == 2
        assert capsys.readouterr() == printed


def _status(module: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the `main` of a command line and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as leaving:
        module.main()
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_an_interrupt_closes_the_engine_and_has_status_130(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines: list[CompiledLLM] = []

    def stream(llm: CompiledLLM, *_: Any) -> Iterator[str]:
        engines.append(llm)
        yield "begun"
        raise KeyboardInterrupt

    monkeypatch.setattr(CompiledLLM, "stream", stream)
    assert (
        _status(
            cli, ["generate", "a", "--config", str(config), "--set", "compile.level=0"], monkeypatch
        )
        == 130
    )
    assert capsys.readouterr().out == "begun"
    with pytest.raises(RuntimeError, match="this CompiledLLM is closed"):
        engines[0].report()
