"""What is kept of a compilation: whole or not at all, for what it was made for and nothing else, and right tokens in any case."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from transformers import PreTrainedModel

from compiled_llm import CompiledLLM
from compiled_llm.report.report import Report
from compiled_llm.runtime.artifacts import artifact as artifact_module
from compiled_llm.runtime.artifacts import cache
from compiled_llm.runtime.artifacts.artifact import (
    Artifact,
    SavedBucket,
    discard,
    read_key,
    read_traffic,
)
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint
from compiled_llm.runtime.capture import warmup
from compiled_llm.runtime.compilation.compiler import DISPATCHES, CompiledStep
from compiled_llm.runtime.compilation.timing import Timestamp, durations
from compiled_llm.runtime.step.step import Step
from compiled_llm.system import atomic_file
from passes import Pipeline
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

KEY = Fingerprint({"torch": "2.11.0", "model": "a"})
OTHER = Fingerprint({"torch": "2.11.0", "model": "b", "dtype": "float32"})
PROMPTS = [prompt_of(5), prompt_of(20)]


def kept(content: bytes) -> SavedBucket:
    return SavedBucket(step=content, passes=[])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "a", KEY)
    assert artifact.load("decode-1-greedy") is None
    assert artifact.incompatibility() is None
    artifact.save("decode-1-greedy", kept(b"one"))
    artifact.save("decode-2-greedy", kept(b"two"))
    artifact.save("decode-1-greedy", kept(b"three"))
    assert artifact.load("decode-1-greedy") == kept(b"three")
    assert artifact.load("decode-2-greedy") == kept(b"two")
    assert artifact.incompatibility() is None
    moved = Artifact(Path(shutil.move(artifact.directory, tmp_path / "b")), KEY)
    assert moved.load("decode-2-greedy") == kept(b"two")


def test_of_another_key_nothing_is_loaded_and_the_parts_are_named(tmp_path: Path) -> None:
    Artifact(tmp_path, KEY).save("decode-1-greedy", kept(b"one"))
    other = Artifact(tmp_path, OTHER)
    assert other.load("decode-1-greedy") is None
    incompatibility = other.incompatibility()
    assert incompatibility is not None
    assert "model: a; here: b, dtype: nothing; here: float32" in incompatibility
    assert "torch" not in incompatibility
    other.save("decode-2-greedy", kept(b"two"))
    assert other.load("decode-1-greedy") is None, "what was compiled for another key is gone"
    assert Artifact(tmp_path, KEY).load("decode-1-greedy") is None
    discard(tmp_path)
    assert read_key(tmp_path) is None
    assert other.incompatibility() is None


def test_what_is_not_the_artifacts_own_stays(tmp_path: Path) -> None:
    """Whatever directory is named."""
    others = [
        tmp_path / name
        for name in ("a.so", "venv/b.so", "venv/c.bucket", "libraries/d.so", "e.bucket")
    ]
    for name in ("venv", "libraries"):
        (tmp_path / name).mkdir()
    for path in others:
        path.write_bytes(b"not ours")
    Artifact(tmp_path, KEY).save("decode-1-greedy", kept(b"one"))
    Artifact(tmp_path, OTHER).save("decode-2-greedy", kept(b"two"))
    assert all(path.read_bytes() == b"not ours" for path in others)
    assert sorted(path.name for path in tmp_path.glob("*.bucket")) == [
        "decode-2-greedy.bucket",
        "e.bucket",
    ]


def test_what_cannot_be_serialised_is_not_kept_and_runs(
    expected: list[list[int]], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(compiled: object) -> bytes:
        raise TypeError("cannot pickle this")

    monkeypatch.setattr(warmup, "serialize", refuse)
    with pytest.warns(
        UserWarning, match="1 of 1 buckets were compiled and not kept: .* cannot pickle this"
    ):
        report = _run(tmp_path, expected, checkpoint, buckets={"decode": [], "prefill": [48]})
    (warning,) = report.warnings
    assert "could not be kept" in warning
    assert "cannot pickle this" in warning
    assert [bucket.failure for bucket in report.buckets] == [None]


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, KEY)
    artifact.save("decode-1-greedy", kept(b"one"))
    (bucket,) = tmp_path.glob("*.bucket")
    manifest = tmp_path / "manifest.json"
    for path in (bucket, manifest):
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert artifact.load("decode-1-greedy") is None or (
                path == manifest and read_key(tmp_path) == KEY
            )
            path.write_bytes(whole[:place])
            assert artifact.load("decode-1-greedy") is None
        path.write_bytes(whole)
    assert artifact.load("decode-1-greedy") == kept(b"one")


def test_a_damaged_manifest_is_replaced_and_anothers_is_not(tmp_path: Path) -> None:
    noticed: list[str] = []
    artifact = Artifact(tmp_path, KEY, noticed.append)
    artifact.save("decode-1-greedy", kept(b"one"))
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    assert artifact.incompatibility() is None
    assert artifact.load("decode-1-greedy") is None
    assert len(noticed) == 1
    assert noticed[0].startswith(f"{manifest} is damaged")
    artifact.save("decode-2-greedy", kept(b"two"))
    assert artifact.load("decode-2-greedy") == kept(b"two")
    assert artifact.load("decode-1-greedy") is None, "of whatever key it was"

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "a web app"}')
    assert "no manifest of an artifact" in str(Artifact(tmp_path / "other", KEY).incompatibility())


def test_a_damaged_bucket_is_noticed(tmp_path: Path) -> None:
    noticed: list[str] = []
    artifact = Artifact(tmp_path, KEY, noticed.append)
    artifact.save("decode-1-greedy", kept(b"one"))
    (bucket,) = tmp_path.glob("*.bucket")
    bucket.write_bytes(bucket.read_bytes()[:-1])
    assert artifact.load("decode-1-greedy") is artifact.load("decode-2-greedy") is None
    assert noticed == [f"{bucket} is damaged: the bucket is compiled anew"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "libraries" / "ab").mkdir(parents=True)
    left = [tmp_path / ".unfinished-abc", tmp_path / "libraries" / "ab" / ".unfinished-def"]
    (tmp_path / "src").mkdir()
    others = [tmp_path / "src" / ".unfinished-poem", tmp_path / ".gitignore"]
    for path in [*left, *others]:
        path.write_bytes(b"")
    Artifact(tmp_path, KEY).save("decode-1-greedy", kept(b"one"))
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_a_process_that_keeps_the_lock_costs_the_artifact_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_file, "_PATIENCE", 0.1)
    artifact = Artifact(tmp_path, KEY)
    with (
        atomic_file.locked(tmp_path),
        pytest.raises(TimeoutError, match="another process has had the lock"),
    ):
        artifact.save("decode-1-greedy", kept(b"one"))
    artifact.save("decode-1-greedy", kept(b"two"))
    assert artifact.load("decode-1-greedy") == kept(b"two")


def _cached(name: str, *, size: int, age: float) -> Path:
    artifact = Artifact(cache.cached_artifacts() / name, KEY)
    artifact.save("decode-1-greedy", kept(b"x" * size))
    os.utime(artifact.directory / "manifest.json", (time.time() - age, time.time() - age))
    return artifact.directory


def test_the_longest_unused_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path))
    monkeypatch.setattr(artifact_module, "_loaded_libraries", list)  # those of other tests
    used, old, older, oldest = (
        _cached(name, size=100_000, age=n)
        for n, name in enumerate(["used", "old", "older", "oldest"])
    )
    assert cache.remove_lru(410_000, used=used) == []
    cache.mark_used(oldest)
    with atomic_file.locked(older):
        assert cache.remove_lru(210_000, used=used) == ["old", "oldest"], (
            "another process writes to older"
        )
    assert [path.name for path in sorted(cache.cached_artifacts().iterdir())] == [
        "older",
        "used",
    ]
    assert cache.remove_lru(1, used=used) == ["older"]
    assert Artifact(used, KEY).load("decode-1-greedy") is not None
    assert cache.remove_lru(1, used=tmp_path / "named") == [], "the engine is on another directory"
    assert not old.exists()


def test_tidying_leaves_alone_what_a_link_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artifact_module, "_loaded_libraries", list)
    used, link = _cached("used", size=1000, age=0), cache.cached_artifacts() / "link"
    elsewhere = Artifact(tmp_path / "elsewhere", KEY)
    elsewhere.save("decode-1-greedy", kept(b"x" * 1000))
    link.symlink_to(elsewhere.directory)
    before = {path: path.read_bytes() for path in elsewhere.directory.iterdir()}
    os.utime(elsewhere.directory / "manifest.json", (0, 0))
    assert cache.remove_lru(1, used=used) == []
    assert link.is_symlink()
    assert {path: path.read_bytes() for path in elsewhere.directory.iterdir()} == before


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    (tmp_path / "a").mkdir(mode=0o700)
    (tmp_path / "a" / ".lock").symlink_to(tmp_path / "letter")
    with pytest.raises(OSError, match="symbolic links"):
        Artifact(tmp_path / "a", KEY).save("decode-1-greedy", kept(b"one"))
    assert (tmp_path / "letter").read_text() == "dear"


def test_what_is_made_is_for_this_user_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        Artifact(tmp_path / "a" / "b", KEY).save("decode-1-greedy", kept(b"one"))
    finally:
        os.umask(umask)
    made = [tmp_path / "a", *(tmp_path / "a").rglob("*")]
    assert {path.name: path.stat().st_mode & 0o077 for path in made} == dict.fromkeys(
        (path.name for path in made), 0
    )
    assert {"b", "manifest.json", "decode-1-greedy.bucket"} <= {path.name for path in made}


@pytest.mark.parametrize("place", [".", "manifest.json", "decode-1-greedy.bucket"])
def test_what_others_may_write_is_not_loaded(tmp_path: Path, place: str) -> None:
    noticed: list[str] = []
    artifact = Artifact(tmp_path / "a", KEY, noticed.append)
    artifact.save("decode-1-greedy", kept(b"one"))
    os.chmod(artifact.directory / place, 0o770)
    found = [str(artifact.incompatibility()), *noticed]
    assert artifact.load("decode-1-greedy") is None or place != "decode-1-greedy.bucket"
    (said,) = [line for line in [*found, *noticed] if "others may write to" in line][:1]
    assert f"others may write to {(artifact.directory / place).resolve()} (mode 770)" in said
    os.chmod(artifact.directory / place, 0o700)
    assert artifact.incompatibility() is None
    assert artifact.load("decode-1-greedy") == kept(b"one")


def test_an_artifact_that_others_may_write_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shared").mkdir()
    os.chmod(tmp_path / "shared", 0o777)
    config, report = small_config(compile={"artifact": str(tmp_path / "shared" / "new")}), Report()
    with pytest.warns(
        UserWarning, match=f"not used: others may write to {tmp_path}/shared .mode 777"
    ):
        opened = cache.open_artifact(config, KEY, report, by_graph=False)
    assert opened is not None
    assert opened.directory.parent == tmp_path / "cache" / "artifacts"
    assert [report.artifact_refusal] == report.warnings

    (tmp_path / "cache").mkdir()
    os.chmod(tmp_path / "cache", 0o777)
    with pytest.warns(UserWarning, match=f"not used: others may write to {tmp_path}/cache"):
        assert (
            cache.open_artifact(
                small_config(compile={"artifact": "auto"}), KEY, Report(), by_graph=False
            )
            is None
        )


def test_libraries_that_the_process_has_loaded_come_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    library = here / "ab" / "cd.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"a library")
    monkeypatch.setattr(artifact_module, "_loaded_libraries", lambda: [library])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(here))
    artifact = Artifact(tmp_path / "artifact", KEY)
    artifact.save("decode-1-greedy", kept(b"one"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(there))
    assert artifact.load("decode-1-greedy") == kept(b"one")
    assert (there / "ab" / "cd.so").read_bytes() == b"a library"
    (kept_library,) = artifact.directory.rglob("*.so")
    whole = kept_library.read_bytes()
    kept_library.write_bytes(b"0" * 80)
    shutil.rmtree(there)
    noticed: list[str] = []
    artifact = Artifact(artifact.directory, KEY, noticed.append)
    for _ in range(2):
        artifact.load("decode-1-greedy")
    assert not list(there.rglob("*.so")), "a damaged library is left to the compiler"
    assert noticed == [f"{kept_library} is damaged: the library is compiled anew"]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(here))  # where it has been made again
    artifact.repair()
    assert kept_library.read_bytes() == whole


_WRITER = """
import sys, time
from pathlib import Path
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint
from compiled_llm.runtime.artifacts.artifact import Artifact, SavedBucket
artifact = Artifact(Path(sys.argv[1]), Fingerprint({"torch": "2.11.0", "model": "a"}))
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    time.sleep(0.002)
    artifact.save("decode-1-greedy", SavedBucket(step=sys.argv[2].encode() * 1_000_000, passes=[]))
"""


def _writer(directory: Path, letter: str, times: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(directory), letter, str(times)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_two_writers_and_a_kill_leave_something_whole(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, KEY)
    one, other = _writer(tmp_path, "x", 100_000), _writer(tmp_path, "y", 3)
    assert other.wait(120) == 0, "a lock that nobody lets go of"
    for _ in range(3):
        found = artifact.load("decode-1-greedy")
        assert found is not None
        assert found.step in (b"x" * 1_000_000, b"y" * 1_000_000)
        time.sleep(0.05)
    one.send_signal(signal.SIGKILL)
    one.wait(60)
    assert artifact.load("decode-1-greedy") is not None
    (tmp_path / ".unfinished-killed").write_bytes(b"x")
    last = _writer(tmp_path, "z", 1)
    assert last.wait(60) == 0
    assert artifact.load("decode-1-greedy") == kept(b"z" * 1_000_000)
    assert not list(tmp_path.glob(".unfinished-*"))


_WARM = """
import sys
from torch._dynamo.utils import counters
from compiled_llm import CompiledLLM
from tests.helpers.tiny_models import greedy, small_config
config = small_config(compile={"artifact": sys.argv[1]}, model={"name": sys.argv[3], "dtype": "float32"})
with CompiledLLM.from_pretrained(config=config, progress=False) as llm:
    print(greedy(llm, eval(sys.argv[2]), 10), all(b.loaded for b in llm.report().buckets), llm.report().warnings)
print(dict(counters["stats"]), dict(counters["aot_autograd"]), counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    reference = Reference(tiny_model("llama"))
    return [reference(prompt, 10) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny llama, as `from_pretrained` loads it: without tracing, it is known by its source."""
    tiny_model("llama").save_pretrained(directory := tmp_path_factory.mktemp("checkpoint"))
    return directory


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, expected: list[list[int]], checkpoint: Path
) -> Path:
    """An artifact of tiny llama, from a start with nothing cached."""
    directory = tmp_path_factory.mktemp("artifact")
    report = _run(directory, expected, checkpoint)
    assert not any(bucket.loaded for bucket in report.buckets)
    assert report.facts["artifact"] == str(directory)
    assert not report.warnings
    return directory


def _run(artifact: Path, expected: list[list[int]], checkpoint: Path, **changes: object) -> Report:
    """Start on the artifact, with no other cache, and generate."""
    config = small_config(
        compile={"artifact": str(artifact)},
        model={"name": str(checkpoint), "dtype": "float32"},
        **changes,
    )
    with fresh_cache(), CompiledLLM.from_pretrained(config=config, progress=False) as llm:
        assert greedy(llm, PROMPTS, 10) == expected
        report = llm.report()
        assert not report.fallbacks
        return report


def test_a_new_process_compiles_nothing(
    compiled: Path, expected: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    """From a copy elsewhere, as another user, with another number of cores and the checkpoint in another place."""
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    environment = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "LOGNAME": "someone", "TMPDIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "3",
    }  # fmt: skip
    command = [sys.executable, "-c", _WARM, str(copy), repr(PROMPTS), str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"{expected} True []", "{} {} 0"]


def test_traffic_is_kept_and_added_up(
    compiled: Path, expected: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    (copy / "traffic.json").unlink()
    assert read_traffic(copy) == {}
    _run(copy, expected, checkpoint)
    once = read_traffic(copy)
    assert {kind: traffic.limit for kind, traffic in once.items()} == {"decode": 4, "prefill": 48}
    assert once["prefill"].seen == Counter({16: 1, 10: 1}), (
        "25 tokens of prompts, and the row that decodes meanwhile"
    )
    assert once["decode"].buckets == [2, 4]
    assert once["decode"].seen[2] >= 8
    _run(copy, expected, checkpoint)
    assert read_traffic(copy)["decode"].seen == once["decode"].seen + once["decode"].seen
    (copy / "traffic.json").write_text("{")
    assert read_traffic(copy) == {}


def test_the_passes_reports_are_kept(
    compiled: Path, expected: list[list[int]], checkpoint: Path
) -> None:
    graphs = counters["stats"]["unique_graphs"]
    report = _run(compiled, expected, checkpoint)
    assert counters["stats"]["unique_graphs"] == graphs
    for bucket in report.buckets:
        assert bucket.loaded
        assert [
            each.matches for each in bucket.passes if each.name == "lower_attention_marker"
        ] == [2]


def test_a_bucket_that_is_damaged_or_new_is_compiled(
    compiled: Path, expected: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    damaged = copy / "decode-2-greedy.bucket"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:500] + b"?" + content[501:])
    report = _run(copy, expected, checkpoint, buckets={"decode": [1, 2]})
    assert {bucket.bucket: bucket.loaded for bucket in report.buckets} == {
        "prefill-16-greedy": True, "prefill-48-greedy": True,
        "decode-1-greedy": False, "decode-2-greedy": False, "decode-4-greedy": True,
    }  # fmt: skip
    assert [damaged.name in warning for warning in report.warnings] == [True]
    again = _run(copy, expected, checkpoint, buckets={"decode": [1, 2]})
    assert all(bucket.loaded for bucket in again.buckets), "it was put in order"
    assert not again.warnings


def test_what_cannot_be_loaded_is_compiled_and_named(
    compiled: Path, expected: list[list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    """Whole, and for this key, and yet not what torch can read."""
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    key = read_key(copy)
    assert key is not None
    Artifact(copy, key).save("decode-2-greedy", kept(b"nonsense"))
    report = _run(copy, expected, checkpoint)
    assert [bucket.bucket for bucket in report.buckets if not bucket.loaded] == ["decode-2-greedy"]
    (warning,) = report.warnings
    assert "decode-2-greedy" in warning
    assert "is compiled anew" in warning


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
def test_another_config_leaves_a_named_artifact_alone(
    part: str,
    changes: dict[str, object],
    compiled: Path,
    expected: list[list[int]],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path))
    before = {path: path.read_bytes() for path in compiled.rglob("*") if path.is_file()}
    assert before
    small = {"decode": [], "prefill": []}  # nothing to compile: it is about the choice alone
    model = {"name": str(checkpoint), "dtype": "float32"}
    config = small_config(
        compile={"artifact": str(compiled)}, buckets=small, model=model, **changes
    )
    with pytest.warns(UserWarning, match="the artifact was not used"):
        llm = CompiledLLM.from_pretrained(config=config, progress=False)
    with llm:
        assert greedy(llm, PROMPTS, 10) == expected
        (warning,) = llm.report().warnings
        assert llm.report().artifact_refusal == warning
        assert part in warning
        assert str(llm.report().facts["artifact"]).startswith(str(tmp_path))
    assert before == {path: path.read_bytes() for path in compiled.rglob("*") if path.is_file()}


def _held(
    artifact: Path, change: Callable[[PreTrainedModel], None] | None, **buckets: object
) -> tuple[Report, bool]:
    """Start on a model that the caller made, and changed; whether its tokens are right."""
    model = tiny_model("llama")
    if change is not None:
        change(model)
    right = [Reference(model)(prompt, 10) for prompt in PROMPTS]
    config = small_config(
        compile={"artifact": str(artifact)}, buckets={"decode": [], "prefill": [48], **buckets}
    )
    with fresh_cache(), CompiledLLM(model, None, config, progress=False) as llm:
        return llm.report(), greedy(llm, PROMPTS, 10) == right


def _negate_steps_of_48(model: PreTrainedModel) -> None:
    """Which is not done in the step that the key tells of."""
    model.model.norm.register_forward_hook(
        lambda module, inputs, output: -output if output.shape[1] == 48 else output
    )


def _gelu(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


def test_an_artifact_of_another_model_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same config, classes and weights, but another function."""
    monkeypatch.setenv("COMPILED_LLM_CACHE", str(tmp_path / "cache"))
    report, right = _held(tmp_path / "a", None)
    assert (right, report.warnings) == (True, [])

    with pytest.warns(UserWarning, match="code: graph [0-9a-f]{16}; here: graph [0-9a-f]{16}"):
        report, right = _held(tmp_path / "a", _gelu, prefill=[])
    assert right
    assert "code: graph" in str(report.artifact_refusal)

    report, right = _held(tmp_path / "a", None)
    assert [bucket.loaded for bucket in report.buckets] == [True]
    assert right

    report, right = _held(tmp_path / "a", _negate_steps_of_48)
    assert [bucket.loaded for bucket in report.buckets] == [False]
    assert not right, "the hook ran, which transformers' own steps, of other sizes, do not meet"
    (warning,) = report.warnings
    assert "prefill-48-greedy" in warning
    assert "was compiled from another graph" in warning


@pytest.mark.parametrize("changed", [False, True])
def test_a_loaded_model_that_is_changed_is_not_kept(
    changed: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is of what the checkpoint's source says."""

    def uncompiled(step: Step, pipeline: Pipeline, options: dict[str, object]) -> CompiledStep:
        now = Timestamp.now()
        return CompiledStep(
            launch=step, graph=False, recording=None, owner=None, seconds=durations(now, now, now)
        )

    monkeypatch.setitem(DISPATCHES, "direct", uncompiled)
    monkeypatch.setattr(warmup, "serialize", lambda compiled: b"compiled")
    model, lazy = (
        {"name": str(checkpoint), "dtype": "float32"},
        {"artifact": str(tmp_path / "a"), "capture": "lazy"},
    )
    config = small_config(compile=lazy, model=model, buckets={"decode": [], "prefill": [48]})
    with CompiledLLM.from_pretrained(config=config, progress=False) as llm:
        if changed:
            _gelu(llm.model)
            with pytest.raises(RuntimeError, match="was replaced while an engine uses it"):
                greedy(llm, PROMPTS, 2)
        else:
            greedy(llm, PROMPTS, 2)
        assert [bucket.state for bucket in llm.report().buckets] == [
            "pending" if changed else "compiled"
        ]
    assert len(list((tmp_path / "a").glob("*.bucket"))) == (0 if changed else 1)


def test_a_full_disk_costs_the_artifact_alone(
    expected: list[list[int]], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_file.os, "fsync", full)
    with pytest.warns(
        UserWarning, match="1 of 1 buckets were compiled and not kept: .* No space left on device"
    ):
        report = _run(
            tmp_path / "full", expected, checkpoint, buckets={"decode": [], "prefill": [48]}
        )
    assert [bucket.save_failure for bucket in report.buckets] == report.warnings
    (warning,) = report.warnings
    assert "could not be kept" in warning
    assert "No space left" in warning
    assert not [path for path in (tmp_path / "full").iterdir() if path.name != ".lock"]
