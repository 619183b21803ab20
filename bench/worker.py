"""Worker process: hosts one object whose methods are called through JSON lines.

    python -m bench.worker bench.systems.vllm_offline:VLLM

A request is a line `{"call": METHOD, "arguments": {...}}` on standard input; the first request has
the method `__init__` and constructs the object. A response is a line `{"result": ...}` or
`{"error": "ValueError: ..."}` on standard output. Other output of the process goes to its standard
error.
"""

import importlib
import json
import os
import sys
import traceback
from typing import Any, TextIO


def main() -> None:
    """Handle requests until standard input is closed."""
    responses = _redirect_stdout()
    instance: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["call"] == "__init__":
                instance = _import_class(sys.argv[1])(**request["arguments"])
                response: dict[str, Any] = {"result": None}
            else:
                response = {"result": getattr(instance, request["call"])(**request["arguments"])}
        except Exception as error:
            traceback.print_exc()
            response = {"error": _first_line(error)}
        responses.write(json.dumps(response) + "\n")
        responses.flush()


def _redirect_stdout() -> TextIO:
    """Return standard output as a stream for responses; redirect later writes to standard error.

    The file descriptor is redirected, so this includes output of C libraries.
    """
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return responses


def _import_class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


if __name__ == "__main__":
    main()
