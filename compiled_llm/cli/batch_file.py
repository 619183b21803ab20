"""Complete the prompts of one JSON-lines file into another, and resume a run that was killed.

A line is written as soon as its prompt is complete, in the order in which prompts complete: id, the
prompt as given, outputs, usage, metrics. Prompts with a result in the file are skipped, those with
an `error` included: delete such lines to retry them. Only prompts are compared with those of
results, not the model or the options that produced the results.
"""

import sys
import time
from pathlib import Path
from typing import Any, Self

from compiled_llm.cli.counter import counter
from compiled_llm.cli.prompt_file import PromptLine, merge_sampling_params, read_prompts
from compiled_llm.cli.result_file import ResultFile
from compiled_llm.llm import CompiledLLM
from compiled_llm.sampling_params import SamplingParams


class BatchRun:
    """A file of prompts and the file of its results, which is locked until `close`.

    Args:
        prompts: the file of prompts (see `prompt_file`).
        out: the file of results; created, or continued.
        params: the sampling parameters of prompts whose lines set none.
        raw: complete texts as they are, without the model's chat template.

    Attributes:
        total: the number of prompts in the file.
        remaining: the prompts without a result.

    Raises:
        ValueError: a file or a line of it cannot be used; then nothing is changed.
    """

    def __init__(
        self, prompts: Path, out: Path, params: SamplingParams, *, raw: bool = False
    ) -> None:
        lines = read_prompts(prompts, params)
        if out.exists() and out.samefile(prompts):
            raise ValueError(
                f"--prompts and --out are the same file, {out}: expected another one for the "
                "results"
            )
        self._prompts = prompts
        self._params = params
        self._raw = raw
        self._results = ResultFile(out, prompts, lines)
        self.total = len(lines)
        self.remaining = [line for line in lines.values() if line.id not in self._results.done]

    @property
    def num_failed(self) -> int:
        """Prompts whose result, of this run or an earlier one, has an error."""
        return self._results.num_failed

    def run(self, llm: CompiledLLM) -> None:
        """Complete the remaining prompts.

        Raises:
            ValueError: a prompt cannot be served; then none is run.
        """
        templated = (
            llm.tokenizer is not None and bool(llm.tokenizer.chat_template) and not self._raw
        )
        self._check(llm, templated)
        began, num_tokens = time.perf_counter(), 0
        with counter("generating", len(self.remaining)) as count:
            requests = (self._request(line, templated) for line in self.remaining)
            for number, output in llm.as_completed(requests):
                self._results.write(self.remaining[number], output)
                num_tokens += output.usage["completion_tokens"]
                count(num_tokens)
        seconds = time.perf_counter() - began
        speed = f"{seconds:.1f} s, {num_tokens / seconds:.1f} tokens/s"
        print(
            f"{len(self.remaining)} prompts, {num_tokens} output tokens, {speed}", file=sys.stderr
        )

    def close(self) -> None:
        """Close and unlock the file of results."""
        self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, llm: CompiledLLM, templated: bool) -> None:
        with counter("checking", len(self.remaining)) as count:
            for line in self.remaining:
                try:
                    llm.check(*self._request(line, templated))
                except Exception as error:  # of any class: chat templates raise their own
                    raise ValueError(f"{self._prompts}:{line.number}: {error}") from None
                count(0)

    def _request(self, line: PromptLine, templated: bool) -> tuple[Any, SamplingParams]:
        """Return the line's prompt, as a conversation if the template applies, and its params."""
        prompt = line.content
        if templated and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return prompt, merge_sampling_params(self._params, line.id, line.params)
