"""Cards and tables on the terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.roofline import Roofline

# A column: its title, the row's key, and how a value is written.
Column = tuple[str, str, Callable[[Any], str]]


def number(digits: int) -> Callable[[Any], str]:
    """Writes numbers with so many digits after the point, and thousands apart."""
    return lambda value: f"{value:,.{digits}f}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def show_card(card: Roofline) -> None:
    """The card, as lines of names and values."""
    grid = Table.grid(padding=(0, 2))
    for name, value in card.lines():
        grid.add_row(name, value)
    _console().print(grid)


def show_table(title: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> None:
    """Rows as a table, without the columns that no row fills; below it, why rows have no figures (their `failure`)."""
    shown = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    table = Table(title=title, title_justify="left")
    for place, (name, _, _) in enumerate(shown):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=place == 0)
    for row in rows:
        table.add_row(
            *(write(row[key]) if row.get(key) is not None else "-" for _, key, write in shown)
        )
    console = _console()
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.get("failure"):
            reasons.setdefault(f"{row[columns[0][1]]}: {row['failure']}", []).append(
                str(row.get(columns[1][1]))
            )
    for reason, which in reasons.items():
        console.print(
            f"{reason} ({columns[1][0]} {', '.join(which)})"
            if len(which) < len(rows) and columns[1][1] == "batch"
            else reason
        )


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=160)
