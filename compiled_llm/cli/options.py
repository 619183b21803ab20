"""Types of command-line options.

Typer reads the defaults of list options, so they are mutable in the commands' signatures.
"""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="A YAML file such as configs/smollm2-cpu.yaml.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A YAML file such as configs/smollm2-gpu.yaml; default settings without it.",
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Override one key of the config, e.g. limits.max_num_seqs=8; may be repeated.",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE.jsonl", help="A file of prompts, one JSON per line."),
]
ResultsFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE.jsonl",
        help="The file for the results of --prompts; prompts that it has results of are skipped.",
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report-file",
        metavar="FILE",
        help="Write the engine's report to a file: .html (with plots), .json or .txt.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A directory, a hub id or a .gguf file; without it, the config's model.",
    ),
]
StopTexts = Annotated[
    list[str], typer.Option(help="End the completion at this text; may be repeated.")
]
