"""Prompts from one JSON-lines file, answers to another; a run that was killed goes on where it was.

A line is written as soon as its prompt has ended, in the order in which they end: id, the prompt as it was given, outputs,
usage, metrics. Answers that the file holds are not computed again, those with an `error` included: delete such lines to have
them tried once more. Only their prompts are compared, not the options or the model that they were made with.
"""

import fcntl
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from compiled_llm.cli.prompt_file import (
    Id,
    PromptLine,
    is_id,
    merge_sampling_params,
    parse,
    read_prompts,
    require,
)
from compiled_llm.llm import CompiledLLM
from compiled_llm.outputs import CompletionOutput, Logprob, RequestOutput
from compiled_llm.sampling_params import SamplingParams

_BEGIN = b'{"id": '  # of each line that is written
_SECONDS_BETWEEN_LINES = 10.0


class BatchRun:
    """A file of prompts, and the file of their answers, which is open and locked until `close()`.

    Args:
        prompts: see `prompt_lines`.
        out: is made, or gone on with; what a killed run left of a line at its end is cut off.
        params: of all prompts whose lines do not say otherwise.
        raw: complete texts as they are, without the model's chat template.

    Attributes:
        total: prompts in the file.
        left: those without an answer.

    Raises:
        ValueError: a file cannot be used, or a line of it; the message names both, and nothing was changed.
    """

    def __init__(
        self, prompts: Path, out: Path, params: SamplingParams, *, raw: bool = False
    ) -> None:
        lines = read_prompts(prompts, params)
        if out.exists() and out.samefile(prompts):
            raise ValueError(
                f"--prompts and --out are the same file, {out}: expected another one for the answers"
            )
        self._prompts, self._params, self._raw = prompts, params, raw
        self._answers = _Answers(out, prompts, lines)
        self.total, self.left = (
            len(lines),
            [line for line in lines.values() if line.id not in self._answers.done],
        )

    @property
    def num_failed(self) -> int:
        """Prompts whose answer, of this run or an earlier one, holds an error."""
        return self._answers.num_failed

    def run(self, llm: CompiledLLM) -> None:
        """Answer what is left. Raises a ValueError for a prompt that cannot be served, before any is run."""
        templated = (
            llm.tokenizer is not None and bool(llm.tokenizer.chat_template) and not self._raw
        )
        self._check(llm, templated)
        began, tokens = time.perf_counter(), 0
        with _progress("generating", len(self.left)) as show:
            for number, output in llm.as_completed(
                self._request(line, templated) for line in self.left
            ):
                self._answers.write(_answer(self.left[number], output))
                tokens += output.usage["completion_tokens"]
                show(tokens)
        seconds = time.perf_counter() - began
        speed = f"{tokens} output tokens, {seconds:.1f} s, {tokens / seconds:.1f} tokens/s"
        print(f"{len(self.left)} prompts, {speed}", file=sys.stderr)

    def close(self) -> None:
        """Let go of the file of answers."""
        self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self, llm: CompiledLLM, templated: bool) -> None:
        with _progress("checking", len(self.left)) as show:
            for line in self.left:
                try:
                    llm.check(*self._request(line, templated))
                except Exception as error:  # a chat template raises its own
                    raise ValueError(f"{self._prompts}:{line.number}: {error}") from None
                show(0)

    def _request(self, line: PromptLine, templated: bool) -> tuple[Any, SamplingParams]:
        asks = templated and isinstance(line.content, str)
        prompt = [{"role": "user", "content": line.content}] if asks else line.content
        return prompt, merge_sampling_params(self._params, line.id, line.params)


class _Answers:
    """The file of answers."""

    def __init__(self, path: Path, prompts: Path, lines: Mapping[Id, PromptLine]) -> None:
        self._path, self._prompts, self._lines = path, prompts, lines
        self.done: set[Id] = set()
        self.num_failed = 0
        if path.exists() and not path.is_file():
            raise ValueError(
                f"{path} is not a regular file: expected one that answers can be read from again"
            )
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

    def write(self, answer: dict[str, Any]) -> None:
        """Append a line; it is the system's when this returns."""
        data = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise ValueError(f"{self._path} cannot be written: {error.strerror}") from None
        self._count(answer)

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self._path} is being written by another run: wait for its end, or choose another --out"
            ) from None
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"{self._path} cannot be locked ({error.strerror}): let no other run write to it",
                stacklevel=2,
            )

    def _read(self) -> int:
        """Take in the answers that are there, and say where the last complete line ends."""
        end = 0
        with self._path.open("rb") as file:
            for number, text in enumerate(file, 1):
                torn = not text.endswith(b"\n") and (
                    text.startswith(_BEGIN) or _BEGIN.startswith(text)
                )
                if not torn:
                    self._take(number, text)
                    end += len(text)
        return end

    def _take(self, number: int, text: bytes) -> None:
        try:
            answer = parse(text)
            require(
                text.endswith(b"\n") and _is_answer(answer),
                "the line",
                "an answer that an earlier run wrote",
                answer,
            )
            self._compare(answer)
        except ValueError as error:
            raise ValueError(f"{self._path}:{number}: {error}") from None
        self._count(answer)

    def _compare(self, answer: dict[str, Any]) -> None:
        line = self._lines.get(answer["id"])
        if line is None:
            raise ValueError(
                f"id {answer['id']!r} is not in {self._prompts}: it answers another file's prompts"
            )
        if answer["id"] in self.done:
            raise ValueError(f"id {answer['id']!r} is answered twice: delete one of the lines")
        if answer.get(line.kind) != line.content:
            where = f"{self._prompts}:{line.number}"
            raise ValueError(
                f"id {answer['id']!r} answers another prompt than {where} asks now: delete the line, or change --out"
            )

    def _count(self, answer: dict[str, Any]) -> None:
        self.done.add(answer["id"])
        self.num_failed += any("error" in output for output in answer["outputs"])


def _is_answer(value: Any) -> bool:
    outputs = value.get("outputs") if isinstance(value, dict) and is_id(value.get("id")) else None
    return isinstance(outputs, list) and all(isinstance(output, dict) for output in outputs)


def _answer(line: PromptLine, output: RequestOutput) -> dict[str, Any]:
    """A line of the file; the metrics are those of the completion that ended last."""
    metrics = [
        completion.metrics for completion in output.outputs if completion.metrics is not None
    ]
    last = max(metrics, key=lambda entry: entry.total or 0.0, default=None)
    answer = {
        "id": line.id,
        line.kind: line.content,
        "outputs": [_completion(completion) for completion in output.outputs],
        "usage": output.usage,
        "metrics": None if last is None else asdict(last),
    }
    if output.prompt_logprobs is not None:
        answer["prompt_logprobs"] = _plain(output.prompt_logprobs)
    return answer


def _completion(output: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.error is not None:
        found["error"] = output.error
    if output.logprobs is not None:
        found["logprobs"] = _plain(output.logprobs)
    return found


def _plain(
    logprobs: list[dict[int, Logprob]] | list[dict[int, Logprob] | None],
) -> list[dict[int, Any] | None]:
    return [
        None if at is None else {token: asdict(entry) for token, entry in at.items()}
        for at in logprobs
    ]


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Counts calls, on standard error: a bar on a terminal, else a line now and then. Each call gives the tokens so far."""
    console, began, count = Console(stderr=True), time.perf_counter(), 0
    printed = began
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        TextColumn("{task.fields[speed]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(name, total=total, speed="")

        def show(tokens: int) -> None:
            nonlocal count, printed
            count, now = count + 1, time.perf_counter()
            speed = f"{tokens / (now - began):.0f} tokens/s" if tokens else ""
            bar.update(task, advance=1, speed=speed)
            if not console.is_terminal and now - printed > _SECONDS_BETWEEN_LINES:
                printed = now
                print(
                    ", ".join(filter(None, (f"{name}: {count} of {total}", speed))),
                    file=sys.stderr,
                    flush=True,
                )

        yield show
