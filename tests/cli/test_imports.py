"""Tests of importing the package: without torch, and without side effects."""

import subprocess
import sys
from importlib import metadata

import pytest

import compiled_llm

# Raises KeyboardInterrupt, as Ctrl-C does, where torch is first imported.
_INTERRUPTED = """
import os, signal, sys
# A shell's background job ignores the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
from importlib.abc import MetaPathFinder
class Interrupt(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


def _run(code: str, *, check: bool = True) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=check, timeout=120
    )


def test_the_garbage_collector_is_left_alone() -> None:
    code = (
        "import compiled_llm, gc\n"
        "before = gc.get_threshold(), gc.isenabled()\n"
        "compiled_llm.CompiledLLM\n"
        "print((gc.get_threshold(), gc.isenabled()) == before, gc.get_freeze_count())"
    )
    assert _run(code).stdout.split("\n")[-2] == "True 0"


@pytest.mark.parametrize(
    "code",
    [
        "import compiled_llm, compiled_llm.cli.main, bench.cli; dir(compiled_llm)",
        "import compiled_llm; compiled_llm.__version__",
        "from compiled_llm import SamplingParams; SamplingParams(temperature=0.5)",
        "from compiled_llm import load_config; load_config(None, ['limits.max_num_seqs=8'])",
        "from compiled_llm import CompletionOutput, Config, QueueFullError, RequestOutput",
    ],
)
def test_torch_is_imported_only_when_needed(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "False\n"


def test_all_public_names_are_found() -> None:
    assert set(compiled_llm.__all__) | {"__version__"} <= set(dir(compiled_llm))
    for name in compiled_llm.__all__:
        assert getattr(compiled_llm, name).__name__ == name


def test_the_version_is_that_of_the_package() -> None:
    assert compiled_llm.__version__ == metadata.version("compiled-llm")
    with pytest.raises(AttributeError, match="no attribute 'CompiledLM'"):
        compiled_llm.CompiledLM  # noqa: B018


def test_the_time_of_the_import_is_known() -> None:
    code = (
        "import compiled_llm, time\n"
        "began = time.perf_counter()\n"
        "before = compiled_llm.import_seconds\n"
        "compiled_llm.CompiledLLM\n"
        "print(before == 0 < compiled_llm.import_seconds <= time.perf_counter() - began)"
    )
    assert _run(code).stdout.split("\n")[-2] == "True"


@pytest.mark.parametrize("module", ["compiled_llm.__main__", "compiled_llm.cli.main", "bench.cli"])
def test_an_interrupt_during_the_import_prints_nothing(module: str) -> None:
    command = "['latency']" if module == "bench.cli" else "['inspect']"
    code = f"{_INTERRUPTED}\nsys.argv[1:] = {command}\nfrom {module} import main\nmain()"
    done = _run(code, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
