"""The process behind `CompilePool`: it imports the compiler once, and forks as many as shall compile side by side.

    python -m compiled_llm.runtime.compilation.worker

It reads one pickled `CompileTask` from standard input, and writes a line of JSON for each bucket to standard output when that lies in
the artifact, or has failed. When its standard input ends, it ends, and all that it forked with it.
"""

import json
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
from dataclasses import replace
from typing import Any, BinaryIO

from compiled_llm.imported import importing

with importing():
    import torch
    import torch._dynamo.convert_frame
    import torch._inductor.codegen.triton
    import torch._inductor.compile_fx

    from compiled_llm.runtime.artifacts.artifact import SavedBucket
    from compiled_llm.runtime.artifacts.fingerprint import Fingerprint, compiler_settings
    from compiled_llm.runtime.buckets import Bucket
    from compiled_llm.runtime.compilation import weightless_pickle
    from compiled_llm.runtime.compilation.compiler import compile_only
    from compiled_llm.runtime.compilation.compiler_cache import private_compiler_cache
    from compiled_llm.runtime.compilation.pipeline import make_pipeline
    from compiled_llm.runtime.compilation.worker_pool import CompileTask
    from passes.ops.precompile import compile_kernels

_NUMBER = struct.Struct("=H")


def main() -> None:
    """See the module."""
    answers = os.dup(1)
    os.dup2(2, 1)
    size = sys.stdin.buffer.read(8)
    if len(size) < 8:
        return
    work: CompileTask = pickle.loads(sys.stdin.buffer.read(int.from_bytes(size)))
    tasks, numbers = os.pipe()
    os.write(numbers, b"".join(_NUMBER.pack(number) for number in range(len(work.buckets))))
    os.close(numbers)
    for _ in range(work.processes):
        if not os.fork():
            try:
                _compile_all(work, tasks, answers)
            finally:
                os._exit(0)
    threading.Thread(target=_end_with, args=(sys.stdin.buffer,), daemon=True).start()
    for _ in range(work.processes):
        os.wait()


def _end_with(stream: BinaryIO) -> None:
    stream.read()
    os.killpg(0, signal.SIGKILL)


def _compile_all(work: CompileTask, tasks: int, answers: int) -> None:
    """Take the number of a bucket, compile that, and so on while there are any."""
    torch.set_num_threads(work.num_threads)
    failure, engine = None, None
    try:
        _check_settings(work.artifact.key)
        engine = weightless_pickle.loads(work.engine)
    except Exception as error:
        failure = error
    while number := os.read(tasks, _NUMBER.size):
        bucket = work.buckets[_NUMBER.unpack(number)[0]]
        try:
            if failure is not None:
                raise failure
            _compile(bucket, engine, work)
            answer = {"bucket": str(bucket)}
        except Exception as error:
            traceback.print_exc()
            answer = {"bucket": str(bucket), "failure": f"{type(error).__name__}: {error}"[:500]}
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _check_settings(key: Fingerprint) -> None:
    """Raise RuntimeError where this process would compile otherwise than the one that asks."""
    different = key.differences(replace(key, settings=compiler_settings()))
    if different:
        raise RuntimeError(
            f"torch's compiler was set up otherwise in the process that asks: {', '.join(different)}"
        )


@torch.no_grad()
def _compile(bucket: Bucket, engine: Any, work: CompileTask) -> None:
    model, layers, memory = engine
    pipeline = make_pipeline(work.config, bucket, model, layers)
    options = {"compile_threads": work.threads, **work.config.compile.options}
    with private_compiler_cache():
        step, digest = compile_only(memory.step(model, bucket), pipeline, options)
        kernels = compile_kernels(pipeline.kernel_calls)
        work.artifact.save(
            str(bucket),
            SavedBucket(step=step, passes=pipeline.reports, kernels=kernels, graph_digest=digest),
        )


if __name__ == "__main__":
    main()
