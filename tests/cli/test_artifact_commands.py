"""Tests of the commands compile, explain, verify and buckets suggest."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compiled_llm import llm as api
from compiled_llm.cli.main import app
from compiled_llm.report.report import Report
from compiled_llm.runtime.artifacts.artifact import Artifact, SavedBucket
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint
from compiled_llm.runtime.bucket_tuning import Traffic
from compiled_llm.runtime.verify import verify


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
    limits = "2 sequences, 16 tokens a step, {} each"
    assert different[0] == f"limits: {limits.format(64)}; here: {limits.format(32)}"
    assert [line.partition(":")[0] for line in different] == ["limits", "KV cache"]

    done = run.invoke(app, ["compile", str(config), "-o", str(out), *other])
    assert "limits: 2 sequences" in str(done.exception)
    assert "--force" in str(done.exception)
    assert run.invoke(app, ["explain", str(out), str(config)]).exit_code == 0, (
        "the artifact is unchanged"
    )

    done = run.invoke(app, ["compile", str(config), "-o", str(out), "--force", *other])
    assert done.exit_code == 0, done.output
    assert "artifact" in done.stdout
    assert run.invoke(app, ["explain", str(out), str(config), *other]).exit_code == 0


def test_compile_says_why_a_directory_was_not_used(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message gives this reason alone, whatever other warnings there are."""
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
    assert done.exit_code == 1, "compiled and eager results differ in some bit"
    assert "tokens" in done.stdout


def test_suggest(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, Fingerprint({"torch": "2.11.0"}))
    artifact.save("decode-4-greedy", SavedBucket(step=b"", passes=[]))
    done = CliRunner().invoke(app, ["buckets", "suggest", str(tmp_path)])
    assert "has no record of traffic" in str(done.exception)
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


def test_explain_refuses_a_directory_without_an_artifact(config: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["explain", str(tmp_path), str(config)])
    assert isinstance(done.exception, ValueError)
    assert "no complete manifest" in str(done.exception)
