"""Check of one model type in a process of its own.

A crash, a hang or a lack of memory is then the result of that type only.
"""

import os
import re
import signal
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

from compiled_llm.errors import StrictError, UnsupportedModelError
from tests.model_sweep.result import ModelResult

# One thread each: the models are tiny, and synchronizing threads costs more than they save.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TRITON_INTERPRET": "1",
}
_DATA_DEPENDENT = re.compile(
    r"could not be compiled: (UserError|Unsupported): .*data-dependent", re.IGNORECASE
)


def check_in_subprocess(
    model_type: str, dispatch: str, *, timeout: float, log: Path
) -> ModelResult:
    """Check one type in a new process, whose output goes to `log`; kill it after `timeout` s."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.model_sweep.worker_imports"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, model_type, dispatch, str(log)))
    with patch.dict(os.environ, _ENVIRONMENT):
        process.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            result: ModelResult = ours.recv()
        else:
            result = ModelResult(status="fails", reason=f"it took more than {timeout:.0f} s")
    except EOFError:
        process.join()
        reason = f"its process died: {_exit_reason(process.exitcode)}"
        result = ModelResult(status="fails", reason=reason)
    process.kill()
    process.join()
    return result


def _exit_reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"


def _run(connection: Connection, model_type: str, dispatch: str, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    connection.send(check_model_type(model_type, dispatch))


def check_model_type(model_type: str, dispatch: str) -> ModelResult:
    """Check one model type or variant in this process, with `compile.dispatch` as given."""
    from tests.model_sweep.check import MismatchError, check
    from tests.model_sweep.record import read_known_unsupported
    from tests.model_sweep.tiny_configs import tiny_config
    from tests.model_sweep.tiny_model import tiny_model

    known_unsupported = read_known_unsupported()
    if model_type in known_unsupported:
        return ModelResult(status="unsupported", reason=known_unsupported[model_type])
    try:
        comparison = check(tiny_model(tiny_config(model_type)), dispatch)
    except UnsupportedModelError as error:
        return ModelResult(status="unsupported", reason=str(error))
    except MismatchError as error:
        return ModelResult(status="fails", reason=str(error))
    except StrictError as error:
        if (reason := _data_dependent_reason(model_type, str(error))) is not None:
            return ModelResult(status="unsupported", reason=reason)
        return ModelResult(status="fails", reason=_one_line(error))
    except Exception as error:
        traceback.print_exc()
        return ModelResult(status="fails", reason=_one_line(error))
    return ModelResult(
        status="works", difference=comparison.max_difference, exercised=comparison.exercised
    )


def _data_dependent_reason(model_type: str, error: str) -> str | None:
    """Return the reason if a compilation failed on data-dependent control flow, else None."""
    if not _DATA_DEPENDENT.search(error):
        return None
    return (
        f"{model_type}: its forward has data-dependent control flow, so it cannot be captured as "
        "one graph and would run eagerly"
    )


def _one_line(error: Exception, limit: int = 200) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else f"{text[:limit]}..."
