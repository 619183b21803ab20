"""The file that receives the results of a batch, one JSON line per prompt.

It is opened for appending and locked, so that no two runs write to it. A run that was killed may
have left an incomplete last line, which is cut off.
"""

import fcntl
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compiled_llm.cli.prompt_file import Id, PromptLine, is_id, parse_json_line, require
from compiled_llm.outputs import CompletionOutput, Logprob, RequestOutput

_LINE_START = b'{"id": '  # of each line that is written


class ResultFile:
    """The results of earlier runs and of this one; `close` unlocks the file.

    Args:
        path: the file; created if absent.
        prompts: the file of prompts, for messages.
        lines: its prompts by id. Every result in the file must belong to one of them.

    Attributes:
        done: ids of the prompts that have a result.
        num_failed: prompts whose result has an error.

    Raises:
        ValueError: the file cannot be used, or a line of it is not a result of these prompts; then
            nothing is changed.
    """

    def __init__(self, path: Path, prompts: Path, lines: Mapping[Id, PromptLine]) -> None:
        self._path = path
        self._prompts = prompts
        self._lines = lines
        self.done: set[Id] = set()
        self.num_failed = 0
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file: expected one for the results")
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._file.truncate(self._read())
        except BaseException:
            self.close()
            raise

    def write(self, line: PromptLine, output: RequestOutput) -> None:
        """Append the result of a prompt. The system has it when this returns."""
        result = _result(line, output)
        data = json.dumps(result, ensure_ascii=False).encode() + b"\n"
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise ValueError(f"{self._path} cannot be written: {error.strerror}") from None
        self._count(result)

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self._path} is being written by another run: wait for its end, or choose "
                "another --out"
            ) from None
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"{self._path} cannot be locked ({error.strerror}): let no other run write to it",
                stacklevel=2,
            )

    def _read(self) -> int:
        """Read the results that the file has; return the offset at which the last one ends."""
        end = 0
        with self._path.open("rb") as file:
            for number, text in enumerate(file, 1):
                has_our_start = text.startswith(_LINE_START) or _LINE_START.startswith(text)
                if has_our_start and not text.endswith(b"\n"):
                    continue  # the last line of a run that was killed
                self._add(number, text)
                end += len(text)
        return end

    def _add(self, number: int, text: bytes) -> None:
        try:
            result = parse_json_line(text)
            is_result = text.endswith(b"\n") and _is_result(result)
            require(is_result, "the line", "a result that an earlier run wrote", result)
            self._check_prompt(result)
        except ValueError as error:
            raise ValueError(f"{self._path}:{number}: {error}") from None
        self._count(result)

    def _check_prompt(self, result: dict[str, Any]) -> None:
        """Check that the result is of a prompt in the file, and the only one."""
        name = result["id"]
        line = self._lines.get(name)
        if line is None:
            raise ValueError(
                f"id {name!r} is not in {self._prompts}: expected results of its prompts alone; "
                "choose another --out"
            )
        if name in self.done:
            raise ValueError(f"id {name!r} has two results: delete one of the lines")
        if result.get(line.kind) != line.content:
            raise ValueError(
                f"id {name!r} is the result of another prompt than {self._prompts}:{line.number}: "
                "delete the line, or choose another --out"
            )

    def _count(self, result: dict[str, Any]) -> None:
        self.done.add(result["id"])
        self.num_failed += any("error" in output for output in result["outputs"])


def _is_result(value: Any) -> bool:
    outputs = value.get("outputs") if isinstance(value, dict) and is_id(value.get("id")) else None
    return isinstance(outputs, list) and all(isinstance(output, dict) for output in outputs)


def _result(line: PromptLine, output: RequestOutput) -> dict[str, Any]:
    """Return a line of the file; its metrics are those of the completion that ended last."""
    metrics = [
        completion.metrics for completion in output.outputs if completion.metrics is not None
    ]
    last = max(metrics, key=lambda entry: entry.total or 0.0, default=None)
    result = {
        "id": line.id,
        line.kind: line.content,
        "outputs": [_completion(completion) for completion in output.outputs],
        "usage": output.usage,
        "metrics": None if last is None else asdict(last),
    }
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = _plain(output.prompt_logprobs)
    return result


def _completion(output: CompletionOutput) -> dict[str, Any]:
    completion: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.error is not None:
        completion["error"] = output.error
    if output.logprobs is not None:
        completion["logprobs"] = _plain(output.logprobs)
    return completion


def _plain(
    logprobs: list[dict[int, Logprob]] | list[dict[int, Logprob] | None],
) -> list[dict[int, Any] | None]:
    return [
        None if entry is None else {token: asdict(logprob) for token, logprob in entry.items()}
        for entry in logprobs
    ]
