"""What importing the package, and running its command line, leaves behind."""

import subprocess
import sys

import pytest

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


def test_the_package_alone_is_imported_without_torch() -> None:
    code = (
        "import compiled_llm, compiled_llm.cli.main, bench.cli, sys\n"
        "print('torch' in sys.modules, 'CompiledLLM' in dir(compiled_llm))"
    )
    assert _run(code).stdout == "False True\n"


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
def test_an_interrupt_during_the_import_ends_the_command_quietly(module: str) -> None:
    command = "['latency']" if module == "bench.cli" else "['inspect']"
    code = f"{_INTERRUPTED}\nsys.argv[1:] = {command}\nfrom {module} import main\nmain()"
    done = _run(code, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
