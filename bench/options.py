"""Command-line options that the commands share, and the parsing of lists and ranges."""

from pathlib import Path
from typing import Annotated

import typer

from bench.systems import SYSTEMS

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file such as configs/qwen3-0.6b-random.yaml."),
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated."),
]
Systems = Annotated[
    str,
    typer.Option(
        help="Systems to run, separated by commas; ratios refer to the first. "
        f"Some of {', '.join(SYSTEMS)}."
    ),
]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")]
Batch = Annotated[int, typer.Option("--batch", help="Number of sequences that decode.")]
Context = Annotated[int, typer.Option(help="Prompt tokens of each sequence.")]
Steps = Annotated[int, typer.Option(help="Decode steps of a sample.")]
Rounds = Annotated[
    int,
    typer.Option(help="Samples of each figure, in which systems take turns; medians are shown."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Directory for results; bench/results of the checkout by default."),
]
Limit = Annotated[float, typer.Option(help="Maximum seconds of one call of a system.")]
VLLMPath = Annotated[
    str | None,
    typer.Option(
        "--vllm-pythonpath",
        envvar="BENCH_VLLM_PYTHONPATH",
        help="Directory that is searched first for modules, in vLLM's process only.",
    ),
]
Prompts = Annotated[int, typer.Option(help="Number of prompts; the maximum with --sharegpt.")]
PromptLengths = Annotated[
    str, typer.Option(metavar="A-B", help="Smallest and largest number of prompt tokens.")
]
OutputLengths = Annotated[
    str, typer.Option(metavar="A-B", help="Smallest and largest number of output tokens.")
]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
ShareGPT = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="Take lengths from conversations in this file."),
]
ProfileSteps = Annotated[
    int,
    typer.Option(
        "--profile",
        metavar="STEPS",
        help="Profile this many steps of our engines for the GPU's idle share.",
    ),
]
Largest = Annotated[
    int | None, typer.Option(help="Largest batch size; limits.max_num_seqs by default.")
]
OnlyPasses = Annotated[
    str,
    typer.Option(
        "--only",
        metavar="NAMES",
        help="Leave out only these passes, separated by commas; all in turn by default.",
    ),
]
OnlyKernels = Annotated[
    str | None, typer.Option("-k", help="A pytest expression that selects kernels, e.g. decode.")
]


def parse_names(text: str) -> list[str]:
    """Return the parts of a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_numbers(text: str, option: str) -> list[int]:
    """Return the positive numbers of a list separated by commas.

    Raises:
        ValueError: the list is empty or holds something else.
    """
    parts = parse_names(text)
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(
            f"{option} {text!r}: expected positive numbers separated by commas, such as 1,8,32"
        )
    return [int(part) for part in parts]


def parse_range(text: str, option: str) -> tuple[int, int]:
    """Return both ends of a range such as 100-1024.

    Raises:
        ValueError: the text is no range of positive numbers.
    """
    parts = text.split("-")
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        low, high = map(int, parts)
        if 0 < low <= high:
            return low, high
    raise ValueError(f"{option} {text!r}: expected two numbers, smallest first, such as 100-1024")
