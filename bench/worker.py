"""One object in a process of its own, called over JSON lines on standard input and output.

    python -m bench.worker bench.systems.vllm_offline:Vllm

A request is `{"call": method, "arguments": {...}}`, the first one `{"call": "make", ...}` for the constructor; an answer is
`{"result": ...}` or `{"error": "ValueError: ..."}`. Whatever else the process prints goes to its standard error.
"""

import importlib
import json
import os
import sys
import traceback
from typing import Any, TextIO


def main() -> None:
    answers = _take_stdout()
    target: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["call"] == "make":
                target = _find(sys.argv[1])(**request["arguments"])
                answer: dict[str, Any] = {"result": None}
            else:
                answer = {"result": getattr(target, request["call"])(**request["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": _one_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _take_stdout() -> TextIO:
    """Keep standard output for the answers; prints, also those of libraries in C, go to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _find(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


if __name__ == "__main__":
    main()
