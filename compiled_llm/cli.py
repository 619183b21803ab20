"""The command line: a thin face over the API. Bad input is one line on standard error and exit code 2."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from compiled_llm.config import load_config

app = typer.Typer(no_args_is_help=True, add_completion=False, help="LLM inference by compilation.")

ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file such as configs/smollm2-gpu.yaml.")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated.")]
Model = Annotated[str | None, typer.Option("--model", help="A directory, hub id or .gguf file; the default model when left out.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to complete, or (by default) to answer.")],
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006  # typer reads the default
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="For reproducible sampling.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the prompt as it is, without the chat template.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Print what was done and what it cost, on standard error.")] = False,
) -> None:
    """Answer a prompt, and print the text as it comes."""
    from compiled_llm.api import CompiledLLM
    from compiled_llm.engine.sampling_params import SamplingParams

    if not prompt:
        raise ValueError("the prompt is empty: expected at least one character")
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with CompiledLLM.from_pretrained(model, config=load_config(config, overrides)) as llm:
        templated = llm.tokenizer is not None and llm.tokenizer.chat_template and not raw
        for text in llm.stream([{"role": "user", "content": prompt}] if templated else prompt, params):
            print(text, end="", flush=True)
        print()
        if report:
            print(llm.report(), file=sys.stderr)


@app.command()
def inspect(config: ConfigFile = None, overrides: Overrides = [], model: Model = None) -> None:  # noqa: B006
    """Start an engine and print its phases, buckets, passes and fallbacks."""
    from compiled_llm.api import CompiledLLM

    with CompiledLLM.from_pretrained(model, config=load_config(config, overrides)) as llm:
        print(llm.report())


def main() -> None:
    """The console script."""
    try:
        app()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
