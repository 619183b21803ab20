"""One model type in a process of its own, so that a crash, a hang or a lack of memory is one line of the table."""

import os
import re
import signal
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

from compiled_llm.errors import StrictError, UnsupportedModelError
from tests.model_sweep.outcome import Outcome

# The models are tiny: threads that wait for each other cost more than they bring.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TRITON_INTERPRET": "1",
}


def run_apart(model_type: str, dispatch: str, *, timeout: float, log: Path) -> Outcome:
    """The outcome of one type; what its process prints goes to the log."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.model_sweep.worker_imports"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, model_type, dispatch, str(log)))
    with patch.dict(os.environ, _ENVIRONMENT):
        process.start()
    theirs.close()
    try:
        outcome: Outcome = (
            ours.recv()
            if ours.poll(timeout)
            else Outcome(status="fails", reason=f"it took more than {timeout:.0f} s")
        )
    except EOFError:
        process.join()
        outcome = Outcome(status="fails", reason=f"its process died: {_manner(process.exitcode)}")
    process.kill()
    process.join()
    return outcome


def _manner(exitcode: int | None) -> str:
    return (
        signal.Signals(-exitcode).name
        if exitcode is not None and exitcode < 0
        else f"exit code {exitcode}"
    )


def _serve(connection: Connection, model_type: str, dispatch: str, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    connection.send(outcome_of(model_type, dispatch))


def outcome_of(model_type: str, dispatch: str, excuses: dict[str, str] | None = None) -> Outcome:
    """The outcome of one type, in this process."""
    from tests.model_sweep.check import MismatchError, check
    from tests.model_sweep.record import read_excuses
    from tests.model_sweep.tiny_configs import tiny_config
    from tests.model_sweep.tiny_model import tiny_model

    excuse = (read_excuses() if excuses is None else excuses).get(model_type)
    if excuse is not None:
        return Outcome(status="unsupported", reason=excuse)
    try:
        found = check(tiny_model(tiny_config(model_type)), dispatch)
    except UnsupportedModelError as error:
        return Outcome(status="unsupported", reason=str(error))
    except MismatchError as error:
        return Outcome(status="fails", reason=str(error))
    except StrictError as error:
        reason = _untraceable(model_type, str(error))
        return Outcome(
            status="unsupported" if reason else "fails", reason=reason or _one_line(error)
        )
    except Exception as error:
        traceback.print_exc()
        return Outcome(status="fails", reason=_one_line(error))
    return Outcome(status="works", difference=found.largest, exercised=found.exercised)


def _untraceable(model_type: str, error: str) -> str | None:
    """What is said of a forward of which torch can make no graph, if that is what failed."""
    if not re.search(
        r"could not be compiled: (UserError|Unsupported): .*data-dependent", error, re.IGNORECASE
    ):
        return None
    return f"{model_type}: its forward branches on values, so that it is no single graph, and would run eagerly"


def _one_line(error: Exception, limit: int = 200) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else f"{text[:limit]}..."
