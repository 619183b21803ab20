"""Tables as plain text, and how they print."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WORDS = {"state", "made by", "failure", "bucket", "outcome"}


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table, as text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return column > 0 and self.columns[column] not in _WORDS


def render_text(parts: Iterable[ReportTable | str]) -> str:
    """Tables, and lines between them, for a terminal of 140 columns."""
    console = Console(file=io.StringIO(), width=140)
    for part in parts:
        if isinstance(part, ReportTable):
            console.print(_table(part))
        else:
            console.print(part, highlight=False, markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _table(source: ReportTable) -> Table:
    table = Table(title=source.title, title_justify="left")
    for number, column in enumerate(source.columns):
        table.add_column(column, justify="right" if source.is_number(number) else "left")
    for row in source.rows:
        table.add_row(*map(Text, row))
    return table
