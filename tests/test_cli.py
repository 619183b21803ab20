"""The commands that compile and explain."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from compiled_llm.cli import app
from compiled_llm.runtime import verify
from compiled_llm.runtime.artifact_key import Key
from compiled_llm.runtime.artifacts import Artifact, Kept
from compiled_llm.runtime.traffic import Traffic
from tests.tiny import tiny_model


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


def test_compile_then_explain(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    run, out = CliRunner(), tmp_path / "artifact"
    done = run.invoke(app, ["compile", str(config), "-o", str(out), "--report-file", str(tmp_path / "page.html")])
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
    assert different[0] == "limits: 2 sequences, 16 tokens a step, 64 each; here: 2 sequences, 16 tokens a step, 32 each"
    assert [line.partition(":")[0] for line in different] == ["limits", "KV cache"]

    done = run.invoke(app, ["compile", str(config), "-o", str(out), *other])
    assert "limits: 2 sequences" in str(done.exception)
    assert "--force" in str(done.exception)
    assert run.invoke(app, ["explain", str(out), str(config)]).exit_code == 0, "it was left alone"

    done = run.invoke(app, ["compile", str(config), "-o", str(out), "--force", *other])
    assert done.exit_code == 0, done.output
    assert "artifact" in done.stdout
    assert run.invoke(app, ["explain", str(out), str(config), *other]).exit_code == 0


def test_verify(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    run = CliRunner()
    done = run.invoke(app, ["inspect", "--config", str(config), "--report-file", str(tmp_path / "page.pdf")])
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
    artifact = Artifact(tmp_path, Key({"torch": "2.11.0"}))
    artifact.save("decode-4-greedy", Kept(step=b"", passes=[]))
    done = CliRunner().invoke(app, ["buckets", "suggest", str(tmp_path)])
    assert "knows of no traffic" in str(done.exception)
    artifact.add_traffic({"decode": Traffic(limit=8, buckets=[4, 8], seen=Counter({3: 2, 8: 1}))})
    done = CliRunner().invoke(app, ["buckets", "suggest", str(tmp_path)])
    assert done.stdout.splitlines() == ["buckets.decode: [3, 8]", "  padding 0.0% of 3 steps; now 12.5% with [4, 8]"]
    done = CliRunner().invoke(app, ["buckets", "suggest", str(tmp_path), "--count", "1"])
    assert done.stdout.splitlines()[0] == "buckets.decode: [8]"
    done = CliRunner().invoke(app, ["buckets", "suggest", str(tmp_path), "--count", "0"])
    assert "at least one bucket" in str(done.exception)


def test_explain_wants_an_artifact(config: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["explain", str(tmp_path), str(config)])
    assert isinstance(done.exception, ValueError)
    assert "no manifest that is whole" in str(done.exception)
