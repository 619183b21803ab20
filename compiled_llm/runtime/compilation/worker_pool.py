"""Buckets compiled side by side, by processes that have no memory for the model and run nothing of it.

What they compile goes into the artifact, where the engine finds it, as it finds what an earlier start compiled. What cannot be
had in this way, because the model does not pickle, say, the engine compiles itself.
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
from dataclasses import dataclass
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
from compiled_llm.runtime.memory.allocation import Memory
from compiled_llm.system.device_memory import free_bytes

Engine = tuple[ServedModel, list[AttentionLayer], Memory]

_MAX_PROCESSES = 16
_MIN_CORES = 4  # with fewer, to import the compiler once more costs what is gained
_CONTEXT_BYTES = 700 * 2**20  # of GPU memory, that a process takes which only compiles for it


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileTask:
    """What there is to compile.

    Attributes:
        engine: the model, its attention layers and its memory, as `weightless_pickle.dumps` gives them.
        processes: how many shall compile; threads: of the compiler, for each.
        num_threads: torch's own, which generated code depends on.
    """

    engine: bytes
    buckets: list[Bucket]
    config: Config
    artifact: Artifact
    processes: int
    threads: int
    num_threads: int


class CompilePool:
    """A process that imports the compiler from the moment on that this is made, and forks others when it gets work."""

    def __init__(self) -> None:
        # To ask CUDA itself whether there is a GPU would make of it a process that must not fork.
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
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
        self._expected: set[str] = set()
        self._answers: dict[str, dict[str, Any]] = {}

    def submit(self, work: CompileTask) -> None:
        """Begin; once in its life. Raises what pickling raises."""
        content = pickle.dumps(work)
        assert self._process.stdin is not None
        self._expected = {str(bucket) for bucket in work.buckets}
        with suppress(BrokenPipeError):  # then nothing is answered
            self._process.stdin.write(len(content).to_bytes(8) + content)
            self._process.stdin.flush()

    def wait(self, bucket: Bucket) -> bool:
        """Wait until the bucket is in the artifact; False where it is not to be had."""
        name = str(bucket)
        while name in self._expected and name not in self._answers:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line:
                self._give_up()
                break
            answer = json.loads(line)
            self._answers[answer["bucket"]] = answer
        return "failure" not in self._answers.get(name, {"failure": "not asked for"})

    def failures(self) -> list[str]:
        """A line for each bucket that is not to be had."""
        return [
            f"{name}: {answer['failure']}"
            for name, answer in self._answers.items()
            if "failure" in answer
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

    def _give_up(self) -> None:
        """All processes have ended."""
        self._messages.seek(0)
        last = (self._messages.read().strip().splitlines() or ["no message"])[-1]
        for name in self._expected - set(self._answers):
            self._answers[name] = {"failure": f"the processes that compile ended too soon: {last}"}

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
    """How many processes shall compile this many buckets; 0 where the engine had better do it itself."""
    chosen, cores = config.compile.processes, _num_cores()
    automatic = (
        min(cores - 1, _MAX_PROCESSES) if cores >= _MIN_CORES and device.type == "cpu" else 0
    )
    wanted = automatic if chosen == "auto" else chosen
    if device.type == "cuda":
        wanted = min(wanted, free_bytes(device) // _CONTEXT_BYTES)
    return min(wanted, missing) if missing > 1 else 0


def start_pool_early(config: Config, device: torch.device) -> CompilePool | None:
    """A pool that imports while the model loads, where it is likely that there will be something to compile."""
    at_once = config.compile.capture == "start"
    return (
        CompilePool()
        if at_once
        and saves_compilations(config)
        and num_processes(config, device, 2)
        and not has_likely_artifact(config)
        else None
    )


@contextmanager
def compile_in_pool(
    pool: CompilePool | None,
    buckets: Sequence[Bucket],
    context: BuildContext,
) -> Iterator[CompilePool | None]:
    """The pool, or one of its own, compiling what the artifact lacks of the buckets; None where the engine had better do it."""
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
            pool.submit(_make_work(missing, engine, context.config, artifact, count))
        except Exception as error:  # whatever pickling raises
            report.warnings.append(
                f"buckets were compiled one after another, because they could not be handed on: {error}"
            )
            yield None
            return
        report.facts["compiled by"] = f"{count} processes"
        yield pool
        report.warnings.extend(
            f"compiled by the engine itself: {failure}" for failure in pool.failures()
        )


def _make_work(
    buckets: list[Bucket], engine: Engine, config: Config, artifact: Artifact, count: int
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
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
