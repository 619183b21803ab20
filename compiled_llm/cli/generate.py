"""The work of `compiled-llm generate`: complete one prompt, or a file of prompts."""

import sys
from collections.abc import Callable
from pathlib import Path

from compiled_llm.cli.batch_file import BatchRun
from compiled_llm.llm import CompiledLLM
from compiled_llm.report.report import Report
from compiled_llm.sampling_params import SamplingParams

Start = Callable[[], CompiledLLM]
Finish = Callable[[Report], None]


def check_prompt_options(
    prompt: str | None, prompts: Path | None, out: Path | None, n: int
) -> None:
    """Raise a ValueError if these options cannot be combined."""
    if (prompt is None) == (prompts is None):
        given = "neither" if prompts is None else "both"
        raise ValueError(f"expected either a prompt or --prompts, got {given}")
    if (prompts is None) != (out is None):
        given = "--out" if prompts is None else "--prompts"
        raise ValueError(f"expected --prompts and --out together, got only {given}")
    if prompt == "":
        raise ValueError("expected a prompt of at least one character, got an empty one")
    if prompt is not None and n != 1:
        raise ValueError(f"expected --n 1 with a single prompt, got --n {n}: use --prompts")


def generate_one(
    start: Start, prompt: str, params: SamplingParams, *, raw: bool, finish: Finish
) -> None:
    """Print the completion of a prompt while it is generated.

    Args:
        start: starts an engine.
        prompt: the prompt.
        params: its sampling parameters.
        raw: complete the prompt as it is, without the model's chat template.
        finish: receives the engine's report.
    """
    with start() as llm:
        templated = llm.tokenizer is not None and llm.tokenizer.chat_template and not raw
        chat = [{"role": "user", "content": prompt}]
        for text in llm.stream(chat if templated else prompt, params):
            print(text, end="", flush=True)
        print()
        finish(llm.report())


def generate_file(
    start: Start, prompts: Path, out: Path, params: SamplingParams, *, raw: bool, finish: Finish
) -> bool:
    """Complete the prompts of a file that have no result yet; return whether none has failed.

    Args:
        start: starts an engine; not called if all prompts have results.
        prompts: the file of prompts.
        out: the file of results.
        params: the sampling parameters of prompts whose lines set none.
        raw: complete texts as they are, without the model's chat template.
        finish: receives the engine's report.
    """
    with BatchRun(prompts, out, params, raw=raw) as batch:
        num_done = batch.total - len(batch.remaining)
        if num_done:
            print(f"resuming: {num_done} of {batch.total} done", file=sys.stderr)
        if batch.remaining:
            with start() as llm:
                batch.run(llm)
                finish(llm.report())
        if batch.num_failed:
            print(
                f'{batch.num_failed} of {batch.total} prompts failed: see their "error" in {out}',
                file=sys.stderr,
            )
        return batch.num_failed == 0
