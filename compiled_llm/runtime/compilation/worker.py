"""The process behind `CompilePool`: imports the compiler once, then forks processes that compile.

    python -m compiled_llm.runtime.compilation.worker

It reads one pickled `CompileTask` from standard input. For each bucket that is saved in the
artifact, or has failed, it writes a line of JSON to standard output. It ends with all processes
that it forked when its standard input ends.
"""

import gc
import json
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from compiled_llm.runtime.compilation.compile_task import CompileTask

_NUMBER = struct.Struct("=H")


def main() -> None:
    """Import the compiler, read the task and compile its buckets."""
    results = os.dup(1)
    os.dup2(2, 1)  # what the compiler prints must not mix with the results
    _import_compiler()
    size = sys.stdin.buffer.read(8)
    if len(size) < 8:
        return
    task: CompileTask = pickle.loads(sys.stdin.buffer.read(int.from_bytes(size)))
    queue, numbers = os.pipe()
    os.write(numbers, b"".join(_NUMBER.pack(number) for number in range(len(task.buckets))))
    os.close(numbers)
    for _ in range(task.processes):
        if not os.fork():
            try:
                _compile_all(task, queue, results)
            finally:
                os._exit(0)
    threading.Thread(target=_end_with, args=(sys.stdin.buffer,), daemon=True).start()
    for _ in range(task.processes):
        os.wait()


def _import_compiler() -> None:
    """Import with the garbage collector off, which saves a sixth of the time.

    Freezing the imported objects keeps collections in the forked processes from copying them.
    """
    gc.disable()
    import_module("compiled_llm.runtime.compilation.compile_task")
    gc.freeze()
    gc.enable()


def _end_with(stream: BinaryIO) -> None:
    stream.read()
    os.killpg(0, signal.SIGKILL)


def _compile_all(task: "CompileTask", queue: int, results: int) -> None:
    """Compile buckets from the queue until it is empty."""
    failure, engine = None, None
    try:
        engine = task.load_engine()
    except Exception as error:
        failure = error
    while number := os.read(queue, _NUMBER.size):
        bucket = task.buckets[_NUMBER.unpack(number)[0]]
        result = {"bucket": str(bucket)}
        try:
            if failure is not None:
                raise failure
            task.compile(bucket, engine)
        except Exception as error:
            traceback.print_exc()
            result["failure"] = f"{type(error).__name__}: {error}"[:500]
        os.write(results, json.dumps(result).encode() + b"\n")


if __name__ == "__main__":
    main()
