"""Compile buckets in parallel, in processes that have no memory for the model and never run it.

The processes save the buckets in the artifact, from which the engine loads them as it loads those
of an earlier start. The engine itself compiles the buckets that the processes cannot compile, for
example because the model does not pickle.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, Self

import torch

from compiled_llm.config.schema import Config
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.runtime.artifacts.artifact import Artifact
from compiled_llm.runtime.artifacts.cache import has_likely_artifact, saves_compilations
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.build_context import BuildContext
from compiled_llm.runtime.compilation import weightless_pickle
from compiled_llm.runtime.compilation.compile_task import CompileTask
from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.system.device_memory import free_bytes

EngineParts = tuple[ServedModel, list[AttentionLayer], Memory]

_MAX_PROCESSES = 16
_MIN_CORES = 4  # with fewer cores, importing the compiler again costs more than is gained
_CONTEXT_BYTES = 700 * 2**20  # GPU memory of a process that only compiles


class CompilePool:
    """A process that imports the compiler at once, and forks others when it gets a task."""

    def __init__(self) -> None:
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            # Without this, looking for a GPU initializes CUDA, and the process must not fork.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115  # until `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compiled_llm.runtime.compilation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=env,
            start_new_session=True,
        )
        self._submitted: set[str] = set()
        self._results: dict[str, dict[str, Any]] = {}

    def submit(self, task: CompileTask) -> None:
        """Start to compile; may be called once. Raises what pickling raises."""
        content = pickle.dumps(task)
        assert self._process.stdin is not None
        self._submitted = {str(bucket) for bucket in task.buckets}
        with suppress(BrokenPipeError):  # the process has ended; `wait` reports it
            self._process.stdin.write(len(content).to_bytes(8) + content)
            self._process.stdin.flush()

    def wait(self, bucket: Bucket) -> bool:
        """Wait until a bucket is in the artifact; return False if it failed."""
        name = str(bucket)
        while name in self._submitted and name not in self._results:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line:
                self._fail_remaining()
                break
            result = json.loads(line)
            self._results[result["bucket"]] = result
        return "failure" not in self._results.get(name, {"failure": "not submitted"})

    def failures(self) -> list[str]:
        """Return a line for each bucket that failed."""
        return [
            f"{name}: {result['failure']}"
            for name, result in self._results.items()
            if "failure" in result
        ]

    def close(self) -> None:
        """End all processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        self._messages.close()

    def _fail_remaining(self) -> None:
        """Mark the buckets without a result as failed, since all processes have ended."""
        self._messages.seek(0)
        last = (self._messages.read().strip().splitlines() or ["no message"])[-1]
        for name in self._submitted - set(self._results):
            failure = f"the processes that compile ended too soon: {last}"
            self._results[name] = {"failure": failure}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def num_processes(config: Config, device: torch.device, missing: int) -> int:
    """Return how many processes compile `missing` buckets; 0 if the engine compiles them itself."""
    if config.compile.processes == "auto":
        cores = _num_cores()
        parallel = cores >= _MIN_CORES and device.type == "cpu"
        count = min(cores - 1, _MAX_PROCESSES) if parallel else 0
    else:
        count = config.compile.processes
    if device.type == "cuda":
        count = min(count, free_bytes(device) // _CONTEXT_BYTES)
    return min(count, missing) if missing > 1 else 0


def start_pool_early(config: Config, device: torch.device) -> CompilePool | None:
    """Start a pool while the model loads, if there is likely something to compile; else None."""
    needed = (
        config.compile.capture == "start"
        and saves_compilations(config)
        and num_processes(config, device, 2)
        and not has_likely_artifact(config)
    )
    return CompilePool() if needed else None


@contextmanager
def compile_in_pool(
    pool: CompilePool | None,
    buckets: Sequence[Bucket],
    context: BuildContext,
) -> Iterator[CompilePool | None]:
    """Let a pool compile the buckets that the artifact does not hold.

    Args:
        pool: a pool from `start_pool_early`; None for a new one.
        buckets: of the engine.
        context: of the engine; its report gets warnings for the buckets that failed. Without an
            artifact, nothing can be handed to a process.

    Yields:
        The pool, or None if the engine compiles all buckets itself.
    """
    artifact, report = context.artifact, context.report
    missing = (
        [bucket for bucket in buckets if not artifact.has(str(bucket))]
        if artifact is not None
        else []
    )
    count = num_processes(context.config, context.device, len(missing))
    if artifact is None or not count:
        yield None
        return
    with CompilePool() if pool is None else nullcontext(pool) as pool:
        try:
            engine = context.model, context.layers, context.memory
            pool.submit(_make_task(missing, engine, context.config, artifact, count))
        except Exception as error:  # pickling may raise anything
            report.warn(
                "buckets are compiled one after another, because the model cannot be passed to "
                f"other processes: {error}"
            )
            yield None
            return
        report.facts["compiled by"] = f"{count} processes"
        yield pool
        for failure in pool.failures():
            report.warn(f"compiled by the engine itself: {failure}")


def _make_task(
    buckets: list[Bucket], engine: EngineParts, config: Config, artifact: Artifact, count: int
) -> CompileTask:
    return CompileTask(
        engine=weightless_pickle.dumps(engine),
        buckets=buckets,
        config=config,
        artifact=Artifact(
            artifact.directory, artifact.key, config=artifact.config, by_graph=artifact.by_graph
        ),
        processes=count,
        threads=max(1, _num_cores() // count),
        num_threads=torch.get_num_threads(),
    )


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
