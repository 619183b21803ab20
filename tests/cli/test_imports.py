"""Tests of importing the package: without torch, and without side effects."""

import subprocess
import sys
from importlib import metadata

import pytest

import compiled_llm

_AFTER = "import compiled_llm, gc; compiled_llm.CompiledLLM; print(gc.isenabled(), gc.get_freeze_count() > 100_000)"

# Raises KeyboardInterrupt, as Ctrl-C does, where torch is first imported.
_INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
from importlib.abc import MetaPathFinder
class Interrupt(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "True True"),
        ("import torch; ", "True False"),
        ("import gc; gc.disable(); ", "False False"),
    ],
    ids=["alone", "after torch", "without collections"],
)
def test_garbage_is_collected_as_before(before: str, after: str) -> None:
    """What was imported is left out of collections, but not where a user's models may be among what is there."""
    done = subprocess.run(
        [sys.executable, "-c", before + _AFTER],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split("\n")[-2] == after


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


def test_an_interrupted_import_leaves_the_collector_on() -> None:
    attempt = "import gc\ntry:\n  from compiled_llm import CompiledLLM\nexcept KeyboardInterrupt:\n"
    code = f"{attempt}  print(gc.isenabled(), gc.get_freeze_count())"
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED + code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "True 0\n"


@pytest.mark.parametrize("module", ["compiled_llm.__main__", "compiled_llm.cli.main", "bench.cli"])
def test_an_interrupt_during_the_import_prints_nothing(module: str) -> None:
    command = "['latency']" if module == "bench.cli" else "['inspect']"
    code = f"{_INTERRUPTED}\nsys.argv[1:] = {command}\nfrom {module} import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
