"""The commands that compile and explain."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

import bench.cli
from compiled_llm import CompiledLLM
from compiled_llm import llm as api
from compiled_llm.cli import main as cli
from compiled_llm.cli.exit_status import run_command
from compiled_llm.cli.main import app
from compiled_llm.errors import QueueFullError, RequestFailedError, StrictError
from compiled_llm.report.report import Report
from compiled_llm.runtime.artifacts.artifact import Artifact, SavedBucket
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint
from compiled_llm.runtime.bucket_tuning import Traffic
from compiled_llm.runtime.verify import verify
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny model in safetensors, and a single bucket."""
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


def test_compile_then_explain(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    run, out = CliRunner(), tmp_path / "artifact"
    done = run.invoke(
        app, ["compile", str(config), "-o", str(out), "--report-file", str(tmp_path / "page.html")]
    )
    assert done.exit_code == 0, done.output
    assert f"artifact: {out}" in done.stdout.replace("\n", "")
    assert [path.name for path in out.glob("*.bucket")] == ["prefill-16-greedy.bucket"]
    assert "prefill-16-greedy, capture" in (tmp_path / "page.html").read_text()

    done = run.invoke(app, ["explain", str(out), str(config)])
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip().endswith(f"it fits {config}")

    other = ["--set", "limits.max_model_len=32"]
    done = run.invoke(app, ["explain", str(out), str(config), *other])
    assert done.exit_code == 1
    different = done.stdout.split("different:")[1].strip().splitlines()
    assert (
        different[0]
        == "limits: 2 sequences, 16 tokens a step, 64 each; here: 2 sequences, 16 tokens a step, 32 each"
    )
    assert [line.partition(":")[0] for line in different] == ["limits", "KV cache"]

    done = run.invoke(app, ["compile", str(config), "-o", str(out), *other])
    assert "limits: 2 sequences" in str(done.exception)
    assert "--force" in str(done.exception)
    assert run.invoke(app, ["explain", str(out), str(config)]).exit_code == 0, "it was left alone"

    done = run.invoke(app, ["compile", str(config), "-o", str(out), "--force", *other])
    assert done.exit_code == 0, done.output
    assert "artifact" in done.stdout
    assert run.invoke(app, ["explain", str(out), str(config), *other]).exit_code == 0


def test_compile_says_why_a_directory_was_not_used(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else there was to warn of before."""
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(api, "new_report", lambda: Report(warnings=["prompts share no pages"]))
    Artifact(tmp_path / "a", Fingerprint({"model": "b"})).save(
        "decode-4-greedy", SavedBucket(step=b"", passes=[])
    )
    nothing = ["--set", "buckets.prefill=[]"]
    done = CliRunner().invoke(app, ["compile", str(config), "-o", str(tmp_path / "a"), *nothing])
    assert str(done.exception).startswith(
        f"the artifact was not used: {tmp_path / 'a'} was compiled for something else: model: b;"
    )
    assert "pages" not in str(done.exception).partition("KV cache")[0]

    (tmp_path / "a").chmod(0o770)
    done = CliRunner().invoke(
        app, ["compile", str(config), "-o", str(tmp_path / "a"), "--force", *nothing]
    )
    assert str(done.exception).startswith(
        f"the artifact was not used: others may write to {tmp_path / 'a'}"
    )


def test_verify(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    run = CliRunner()
    done = run.invoke(
        app, ["inspect", "--config", str(config), "--report-file", str(tmp_path / "page.pdf")]
    )
    assert "must end in" in str(done.exception)
    done = run.invoke(app, ["verify", str(config), "--set", "strict=true"])
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.stdout.splitlines() if "prefill-16-greedy" in line]
    assert "100.0%" in row
    assert "equal" in row

    monkeypatch.setitem(verify.ALLOWED, torch.float32, 0.0)
    done = run.invoke(app, ["verify", str(config), "--set", "strict=true"])
    assert done.exit_code == 1, "two ways to compute something differ in some bit"
    assert "tokens" in done.stdout


def test_suggest(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, Fingerprint({"torch": "2.11.0"}))
    artifact.save("decode-4-greedy", SavedBucket(step=b"", passes=[]))
    done = CliRunner().invoke(app, ["buckets", "suggest", str(tmp_path)])
    assert "knows of no traffic" in str(done.exception)
    artifact.add_traffic({"decode": Traffic(limit=8, buckets=[4, 8], seen=Counter({3: 2, 8: 1}))})
    done = CliRunner().invoke(app, ["buckets", "suggest", str(tmp_path)])
    assert done.stdout.splitlines() == [
        "buckets.decode: [3, 8]",
        "  padding 0.0% of 3 steps; now 12.5% with [4, 8]",
    ]
    done = CliRunner().invoke(app, ["buckets", "suggest", str(tmp_path), "--count", "1"])
    assert done.stdout.splitlines()[0] == "buckets.decode: [8]"
    done = CliRunner().invoke(app, ["buckets", "suggest", str(tmp_path), "--count", "0"])
    assert "at least one bucket" in str(done.exception)


def test_explain_wants_an_artifact(config: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["explain", str(tmp_path), str(config)])
    assert isinstance(done.exception, ValueError)
    assert "no manifest that is whole" in str(done.exception)


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
        ("explain {dir} {dir}", "{dir} has no manifest that is whole"),
        ("buckets suggest {dir}/none", "{dir}/none knows of no traffic"),
        ("exlain", "No such command 'exlain'"),
        ("bench latency --batch=x", "--batch 'x': expected positive numbers with commas"),
        ("bench latency --rounds=x", "Invalid value for '--rounds'"),
        ("bench latency --config {dir}", "config file {dir} cannot be read: Is a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
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
    """Run the `main` of a command line, and return the code that it exits with."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as leaving:
        module.main()
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            PermissionError(13, "Permission denied", "/cache"),
            2,
            "error: /cache: Permission denied\n",
        ),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (
            UnicodeDecodeError("utf-8", b"\xe4", 0, 1, "bad"),
            2,
            "error: 'utf-8' codec can't decode byte 0xe4 in position 0: bad\n",
        ),
        (ValueError("of several\n  lines"), 2, "error: of several lines\n"),
        (
            ModuleNotFoundError("No module named 'matplotlib'"),
            2,
            "error: No module named 'matplotlib'\n",
        ),
        (MemoryError(), 2, "error: MemoryError\n"),
        (torch.OutOfMemoryError("out of memory"), 2, "error: out of memory\n"),
        (QueueFullError("the queue is full"), 2, "error: the queue is full\n"),
        (StrictError("a bucket failed"), 2, "error: a bucket failed\n"),
        (RequestFailedError("the request ended"), 1, "error: the request ended\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(1), 1, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_the_exit_code_of_each_error(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(_raising(error), [], prog_name="program") == status
    assert capsys.readouterr() == ("", line)


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="layer"):
        run_command(_raising(KeyError("layer")), [], prog_name="program")


def _raising(error: BaseException) -> typer.Typer:
    """A command line of one command, which raises."""
    raising = typer.Typer()

    @raising.command()
    def command() -> None:
        raise error

    return raising


def test_an_interrupt_closes_the_engine_and_ends_with_130(
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


_PRINTS = """
import sys, typer
from compiled_llm.cli.exit_status import run_command
app = typer.Typer()
@app.command()
def command() -> None:
    for _ in range(100_000):
        print("a line")
sys.exit(run_command(app, [], prog_name="program"))
"""


def test_a_reader_that_has_enough_is_no_error() -> None:
    program = [sys.executable, "-c", _PRINTS]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "a line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", _PRINTS],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")
