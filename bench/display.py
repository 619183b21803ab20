"""Terminal output: the roofline and tables."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.roofline import Roofline

_WIDTH = 160  # columns of output that does not go to a terminal


class Column(NamedTuple):
    """A column of a table: its title, the key of a row, and the format of the value."""

    title: str
    key: str
    format: Callable[[Any], str] = str


def number(digits: int) -> Callable[[Any], str]:
    """Return a format with `digits` decimal places and separated thousands."""
    return lambda value: f"{value:,.{digits}f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def times(value: float) -> str:
    return f"{value:.2f}x"


# Columns of the decode step that several commands share.
STEP_COLUMNS = (
    Column("ms per step", "step_ms", number(4)),
    Column("spread", "step_spread", percent),
)
BOUND_COLUMN = Column("bandwidth bound, ms", "min_step_ms", number(4))
HOST_COLUMNS = (
    Column("host us", "host_us", number(1)),
    Column("padding", "padded_share", percent),
)


def show_roofline(roofline: Roofline) -> None:
    """Print the roofline as lines of names and values."""
    grid = Table.grid(padding=(0, 2))
    for name, value in roofline.lines():
        grid.add_row(name, value)
    _console().print(grid)


def show_table(title: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table, and the reasons of failed rows (key `failure`) below it.

    Columns without a value in any row are left out.
    """
    shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(shown):
        justify: Any = "left" if place == 0 else "right"
        table.add_column(column.title, justify=justify, no_wrap=place == 0)
    for row in rows:
        table.add_row(*(_cell(column, row) for column in shown))
    console = _console()
    console.print(table)
    for line in _failures(columns, rows):
        console.print(line)


def _cell(column: Column, row: dict[str, Any]) -> str:
    value = row.get(column.key)
    return "-" if value is None else column.format(value)


def _failures(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each reason, with the batch sizes that it affects unless all do."""
    name, batch = columns[0].key, columns[1]
    affected: dict[str, list[str]] = {}
    for row in rows:
        if row.get("failure"):
            reason = f"{row[name]}: {row['failure']}"
            affected.setdefault(reason, []).append(str(row.get(batch.key)))
    return [
        f"{reason} ({batch.title} {', '.join(batches)})"
        if batch.key == "batch" and len(batches) < len(rows)
        else reason
        for reason, batches in affected.items()
    ]


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, markup=False, width=_WIDTH)
