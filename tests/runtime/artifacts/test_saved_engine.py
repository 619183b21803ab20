"""Engines that start from an artifact: the same tokens, and only missing buckets are compiled."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from compiled_llm import CompiledLLM
from compiled_llm.runtime.artifacts.artifact import (
    Artifact,
    read_key,
    read_traffic,
)
from tests.helpers.artifacts import saved
from tests.helpers.tiny_models import greedy, small_config
from tests.runtime.artifacts.engines import PROMPTS, run

_START = """
import sys
from torch._dynamo.utils import counters
from compiled_llm import CompiledLLM
from tests.helpers.tiny_models import greedy, small_config
model = {"name": sys.argv[3], "dtype": "float32"}
config = small_config(compile={"artifact": sys.argv[1]}, model=model)
with CompiledLLM.from_pretrained(config=config, progress=False) as llm:
    report = llm.report()
    loaded = all(bucket.loaded for bucket in report.buckets)
    print(greedy(llm, eval(sys.argv[2]), 10), loaded, report.warnings)
stats, autograd = dict(counters["stats"]), dict(counters["aot_autograd"])
print(stats, autograd, counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, expected: list[list[int]], checkpoint: Path
) -> Path:
    """Return an artifact of tiny llama, from a start with empty caches."""
    directory = tmp_path_factory.mktemp("artifact")
    report = run(directory, expected, checkpoint)
    assert not any(bucket.loaded for bucket in report.buckets)
    assert report.facts["artifact"] == str(directory)
    assert not report.warnings
    return directory


def test_a_new_process_compiles_nothing(
    compiled: Path, expected: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    """The artifact and the checkpoint are copied; the user and the number of threads differ."""
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "LOGNAME": "someone",
        "TMPDIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "3",
    }
    command = [sys.executable, "-c", _START, str(copy), repr(PROMPTS), str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"{expected} True []", "{} {} 0"]


def test_traffic_is_saved_and_added_up(
    compiled: Path, expected: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    (copy / "traffic.json").unlink()
    assert read_traffic(copy) == {}
    run(copy, expected, checkpoint)
    once = read_traffic(copy)
    assert {kind: traffic.limit for kind, traffic in once.items()} == {"decode": 4, "prefill": 48}
    assert once["prefill"].seen == Counter({16: 1, 10: 1}), (
        "25 tokens of prompts and one decoding row"
    )
    assert once["decode"].buckets == [2, 4]
    assert once["decode"].seen[2] >= 8
    run(copy, expected, checkpoint)
    assert read_traffic(copy)["decode"].seen == once["decode"].seen + once["decode"].seen
    (copy / "traffic.json").write_text("{")
    assert read_traffic(copy) == {}


def test_the_reports_of_passes_are_saved(
    compiled: Path, expected: list[list[int]], checkpoint: Path
) -> None:
    graphs = counters["stats"]["unique_graphs"]
    report = run(compiled, expected, checkpoint)
    assert counters["stats"]["unique_graphs"] == graphs
    for bucket in report.buckets:
        assert bucket.loaded
        assert [
            each.matches for each in bucket.passes if each.name == "lower_attention_marker"
        ] == [2]


def test_a_damaged_or_new_bucket_is_compiled(
    compiled: Path, expected: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    damaged = copy / "decode-2-greedy.bucket"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:500] + b"?" + content[501:])
    report = run(copy, expected, checkpoint, buckets={"decode": [1, 2]})
    assert {bucket.bucket: bucket.loaded for bucket in report.buckets} == {
        "prefill-16-greedy": True, "prefill-48-greedy": True,
        "decode-1-greedy": False, "decode-2-greedy": False, "decode-4-greedy": True,
    }  # fmt: skip
    assert [damaged.name in warning for warning in report.warnings] == [True]
    again = run(copy, expected, checkpoint, buckets={"decode": [1, 2]})
    assert all(bucket.loaded for bucket in again.buckets), "it was saved again"
    assert not again.warnings


def test_a_bucket_that_cannot_be_loaded_is_compiled_and_reported(
    compiled: Path, expected: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    """The file is undamaged and of this key, but torch cannot read it."""
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    key = read_key(copy)
    assert key is not None
    Artifact(copy, key).save("decode-2-greedy", saved(b"nonsense"))
    report = run(copy, expected, checkpoint)
    assert [bucket.bucket for bucket in report.buckets if not bucket.loaded] == ["decode-2-greedy"]
    (warning,) = report.warnings
    assert "decode-2-greedy" in warning
    assert "is compiled again" in warning


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("passes and options", {"passes": {"rotary_outer_product": False}}),
        (
            "limits",
            {"limits": {"max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 64}},
        ),
        ("KV cache", {"cache": {"block_size": 32}}),
    ],
)
def test_another_config_does_not_change_a_named_artifact(
    part: str,
    changes: dict[str, object],
    compiled: Path,
    expected: list[list[int]],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path))
    before = {path: path.read_bytes() for path in compiled.rglob("*") if path.is_file()}
    assert before
    small = {"decode": [], "prefill": []}  # nothing is compiled
    model = {"name": str(checkpoint), "dtype": "float32"}
    config = small_config(
        compile={"artifact": str(compiled)}, buckets=small, model=model, **changes
    )
    with CompiledLLM.from_pretrained(config=config, progress=False) as llm:
        assert greedy(llm, PROMPTS, 10) == expected
        (warning,) = llm.report().warnings
        assert "the artifact was not used" in warning
        assert warning in caplog.text
        assert llm.report().startup.artifact_refusal == warning
        assert part in warning
        assert str(llm.report().facts["artifact"]).startswith(str(tmp_path))
    assert before == {path: path.read_bytes() for path in compiled.rglob("*") if path.is_file()}
