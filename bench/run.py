"""One run of a command: config and roofline before it, the table, plots and record after it."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from bench.display import Column, show_roofline, show_table
from bench.figures import Draw, save_figure
from bench.record import make_record, model_name, save_record
from bench.roofline import Roofline
from bench.worker_group import WorkerOptions, probe_roofline
from compiled_llm.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """Result of a command.

    Attributes:
        command: name of the command.
        arguments: its arguments; JSON values.
        rows: rows of the table.
        columns: columns of the table; rows may have more keys, which only the record holds.
        plots: plots, drawn side by side.
        note: text printed below the table.
        details: further entries of the record.
    """

    command: str
    arguments: dict[str, Any]
    rows: list[dict[str, Any]]
    columns: Sequence[Column]
    plots: Sequence[Draw] = ()
    note: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class BenchRun:
    """The config, the measured roofline, and the options that all commands share.

    Attributes:
        config: config of the model; `reserve` may raise its limit on sequence lengths.
        roofline: facts about the model and the device, with resolved limits.
        options: options of the worker processes.
        out: directory of the record and the plots.
    """

    config: Config
    roofline: Roofline
    options: WorkerOptions
    out: Path

    @classmethod
    def begin(cls, config: Config, options: WorkerOptions, out: Path) -> Self:
        """Measure and print the roofline."""
        roofline = probe_roofline(config, options)
        show_roofline(roofline)
        return cls(config=config, roofline=roofline, options=options, out=out)

    def reserve(self, length: int) -> None:
        """Raise `limits.max_model_len` to `length` tokens if it is lower, with a message."""
        limit = self.roofline.max_model_len
        if length <= limit:
            return
        print(
            f"limits.max_model_len is {limit}, raised to {length} for this benchmark",
            file=sys.stderr,
        )
        limits = self.config.limits.model_copy(update={"max_model_len": length})
        self.config = self.config.model_copy(update={"limits": limits})
        self.roofline = replace(self.roofline, max_model_len=length)

    def finish(self, result: CommandResult) -> None:
        """Print the table, save record and plots, and print the record as the last line."""
        title = f"{result.command}: {self.roofline.model}, {self.roofline.device_name}"
        show_table(title, result.columns, result.rows)
        if result.note is not None:
            print(result.note, file=sys.stderr)
        entries = {"rows": result.rows, **result.details}
        record = make_record(result.command, self.config, self.roofline, result.arguments, entries)
        saved = [save_record(record, self.out, model_name(self.config))]
        if result.plots:
            figure = save_figure(saved[0].with_suffix(".png"), title, *result.plots)
            saved += [figure] if figure is not None else []
        print(f"saved {' and '.join(map(str, saved))}", file=sys.stderr)
        print(json.dumps(record), flush=True)
