"""What `compiled-llm generate` does: one prompt, or a file of them."""

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
    """Raise a ValueError unless these options go together."""
    if (prompt is None) == (prompts is None):
        raise ValueError(
            f"expected either a prompt or --prompts, got {'both' if prompts is not None else 'neither'}"
        )
    if (prompts is None) != (out is None):
        raise ValueError(
            f"--prompts and --out go together, got only {'--out' if prompts is None else '--prompts'}"
        )
    if prompt == "":
        raise ValueError("the prompt is empty: expected at least one character")
    if prompt is not None and n != 1:
        raise ValueError(f"a single prompt has one completion, got --n {n}: use --prompts")


def generate_one(
    start: Start, prompt: str, params: SamplingParams, *, raw: bool, finish: Finish
) -> None:
    """Print the answer to a prompt as it comes."""
    with start() as llm:
        templated = llm.tokenizer is not None and llm.tokenizer.chat_template and not raw
        for text in llm.stream(
            [{"role": "user", "content": prompt}] if templated else prompt, params
        ):
            print(text, end="", flush=True)
        print()
        finish(llm.report())


def generate_file(
    start: Start, prompts: Path, out: Path, params: SamplingParams, *, raw: bool, finish: Finish
) -> bool:
    """Answer what is left of the file; whether no prompt of it failed."""
    with BatchRun(prompts, out, params, raw=raw) as batch:
        if len(batch.left) < batch.total:
            print(
                f"resuming: {batch.total - len(batch.left)} of {batch.total} done", file=sys.stderr
            )
        if batch.left:
            with start() as llm:
                batch.run(llm)
                finish(llm.report())
        if batch.num_failed:
            print(
                f'{batch.num_failed} of {batch.total} prompts failed: see their "error" in {out}',
                file=sys.stderr,
            )
        return batch.num_failed == 0
