"""Client of `bench.worker`: starts a worker process and calls the object in it."""

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
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """A call of a worker failed.

    Attributes:
        alive: whether the process still accepts calls.
    """

    def __init__(self, reason: str, *, alive: bool) -> None:
        super().__init__(reason)
        self.alive = alive


class WorkerClient:
    """A worker process that hosts one object.

    Args:
        target: `module:Class` of the object.
        arguments: keyword arguments of its constructor; JSON values.
        pythonpath: directory that precedes all others in the process's module search path.
        env: environment variables to set in the process.
        timeout: seconds that one call may take; the process is killed after that.

    Attributes:
        log: file that receives the process's standard error.

    Raises:
        WorkerError: the constructor failed.
    """

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        pythonpath: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 3600.0,
    ) -> None:
        self._timeout = timeout
        self._timed_out = False
        self._busy = False
        name = target.rpartition(":")[2].lower()
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"compiled-llm-bench-{name}-", suffix=".log", delete=False
        ) as log:
            self.log = Path(log.name)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(pythonpath, env or {}),
                start_new_session=True,
            )
        try:
            self.call("__init__", **arguments)
        except WorkerError:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the object and return its result.

        Raises:
            WorkerError: the method raised, the process ended, or the call exceeded the timeout.
        """
        timer = threading.Timer(self._timeout, self._kill_timed_out)
        timer.start()
        self._busy = True
        try:
            line = self._exchange(json.dumps({"call": method, "arguments": arguments}))
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(self._exit_reason(), alive=False)
        self._busy = False
        response = json.loads(line)
        if "error" in response:
            raise WorkerError(response["error"], alive=True)
        return response["result"]

    def close(self) -> None:
        """End the process and all processes that it started.

        The object's `close` is called first, unless a call is in progress.
        """
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, request: str) -> str:
        """Send a request and return the response, or an empty string if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except OSError:
            return ""

    def _kill_timed_out(self) -> None:
        self._timed_out = True
        self._kill()

    def _kill(self) -> None:
        # The process leads a session of its own, so its id is also that of its process group.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _exit_reason(self) -> str:
        code = self._process.wait()
        if self._timed_out:
            limit = f"--limit {self._timeout:g} s"
            return f"a call took longer than {limit}, and the process was killed: raise --limit"
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return f"the process ended with code {code}: {lines[-1][:300]} (see {self.log})"


def _environment(pythonpath: str | None, env: Mapping[str, str]) -> dict[str, str]:
    paths = [pythonpath, str(ROOT), os.environ.get("PYTHONPATH")]
    return {**os.environ, **env, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
