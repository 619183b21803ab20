"""The other end of `bench.worker`: a handle on an object that lives in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """What a worker could not do, and why; `alive` tells whether it can be asked something else."""

    def __init__(self, reason: str, *, alive: bool) -> None:
        super().__init__(reason)
        self.alive = alive


class WorkerClient:
    """A process with one object.

    Args:
        target: `module:Class`, constructed with `arguments`.
        arguments: plain data.
        pythonpath: searched before everything else.
        env: variables to set.
        limit: seconds that a call may take; the process is killed when one takes longer.

    Raises:
        WorkerError: the object could not be made.
    """

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        pythonpath: str | None = None,
        env: Mapping[str, str] | None = None,
        limit: float = 3600.0,
    ) -> None:
        self._limit, self._late, self._busy = limit, False, False
        name = target.rpartition(":")[2].lower()
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"compiled-llm-bench-{name}-", suffix=".log", delete=False
        ) as log:
            self.log = Path(log.name)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", target],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(pythonpath, env or {}),
                start_new_session=True,
            )  # fmt: skip
        try:
            self.call("make", **arguments)
        except WorkerError:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the object, and wait for what it returns; raises WorkerError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(self._limit, self._kill_late)
        timer.start()
        self._busy = True
        try:
            self._process.stdin.write(json.dumps({"call": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(self._obituary(), alive=False)
        self._busy = False
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], alive=True)
        return answer["result"]

    def close(self) -> None:
        """Let the object free what it holds, unless it is still at work, and end the process, and those it started."""
        if self._busy:
            self._kill()
        elif self._process.poll() is None:
            with suppress(WorkerError):
                self.call("close")
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        self._kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _kill_late(self) -> None:
        self._late = True
        self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(
                self._process.pid, signal.SIGKILL
            )  # a session of its own, so the group's id is the process's

    def _obituary(self) -> str:
        code = self._process.wait()
        if self._late:
            return f"a call took longer than --limit {self._limit:g} s, and the process was killed"
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        return f"the process ended with code {code}: {lines[-1][:300]} (see {self.log})"


def _environment(pythonpath: str | None, env: Mapping[str, str]) -> dict[str, str]:
    paths = [pythonpath, str(ROOT), os.environ.get("PYTHONPATH")]
    return {**os.environ, **env, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
