"""Each program in examples/ runs as its docstring says, on the CPU, and prints what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def _run(name: str, *arguments: str | Path, **variables: str) -> str:
    """Return what the example prints on standard output."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def eager(tmp_path: Path) -> Path:
    """Return a config of the default model that compiles nothing."""
    path = tmp_path / "eager.yaml"
    parent = EXAMPLES / "smollm2.yaml"
    path.write_text(f"extends: {parent}\nmodel: {{dtype: float32}}\ncompile: {{dispatch: eager}}\n")
    return path


def test_every_example_has_a_test_and_a_command() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {
        "asynchronous",
        "compilation_run",
        "custom_pass",
        "offline",
        "own_model",
        "streaming",
    }
    for name in names:
        assert f"    python examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text()


def test_offline(eager: Path) -> None:
    out = _run("offline", "--config", eager)
    assert out.count("prompt:     ") == out.count("completion: ") == 3
    assert "completion: ' Paris" in out
    assert re.search(r"answer: +\w", out)


def test_streaming(eager: Path) -> None:
    out = _run("streaming", "--config", eager)
    assert "seasons" in out.splitlines()[0]
    first, second = re.findall(r"^story \d: Once upon a time(.+)", out, re.MULTILINE)
    assert first != second


def test_asynchronous(eager: Path) -> None:
    out = _run("asynchronous", "--config", eager)
    lines = out.splitlines()
    assert lines[0] == "started:  Write a short story about a lighthouse."
    finished = [line for line in lines if line.startswith("finished: ")]
    assert len(finished) == 3
    assert finished[-1] == "finished: Write a short story about a lighthouse."
    assert "aborted:  Once upon a time" in lines
    assert "The capital of France is Paris" in out


def test_own_model() -> None:
    out = _run("own_model")
    assert "equal: True" in out
    assert "eager steps: 0" in out
    assert "attention after close: sdpa" in out


def test_custom_pass() -> None:
    # Without vector instructions, torch does not probe which of them the C++ compiler supports.
    out = _run("custom_pass", TORCHINDUCTOR_VEC_ISA_OK="0")
    before, after = out.split("after:\n")
    assert before.count("aten.div.Tensor") == after.count(", 0.125)") == 2
    assert "aten.div.Tensor" not in after
    assert "division_to_product: 2 matches, 2 expected" in out
    assert "equal to eager: True" in out
    # The page about passes shows this output, and the pass itself.
    page = (ROOT / "docs" / "writing-a-pass.md").read_text()
    assert before.removeprefix("before:\n").strip() in page
    graph, report = after.split("\n\n")
    assert graph.strip() in page
    assert report.strip() in page
    source = (EXAMPLES / "custom_pass.py").read_text()
    shown = source[source.index("def _run") : source.index("def main")]
    assert shown.strip() in page


def test_compilation_run(tmp_path: Path) -> None:
    out = _run("compilation_run", "--artifact", tmp_path / "artifact")
    first, second = out.split("artifact: ")
    assert "prefill-16-greedy: compiled" in first
    assert "prefill-16-greedy: loaded" in second
    assert "'prefill-16-greedy.bucket'" in second
    assert re.search(r"^  compile +\d+\.\d\d s$", first, re.MULTILINE)
    assert "equal tokens: True" in second
