"""A report into a file, in the form that its name asks for."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from compiled_llm.report.html import render_html
from compiled_llm.report.report import Report
from compiled_llm.system.atomic_file import write_atomic

FORMS = (".html", ".json", ".txt")


def write_report(report: Report, path: Path) -> None:
    """A page with plots, plain data, or tables; raises ValueError for another ending, and where it cannot be written."""
    check_report_path(path)
    forms: dict[str, Callable[[Report], str]] = {
        ".html": render_html,
        ".json": _plain_data,
        ".txt": str,
    }
    try:
        write_atomic(path, forms[path.suffix](report).encode())
    except OSError as error:
        raise ValueError(f"the report cannot be written to {path}: {error.strerror}") from None


def output_report(report: Report, *, printed: bool, file: Path | None) -> None:
    """Print a report on standard error, and write it, as wanted."""
    if printed:
        print(report, file=sys.stderr)
    if file is not None:
        write_report(report, file)


def check_report_path(path: Path | None) -> None:
    """Before anything is started; raises ValueError."""
    if path is not None and path.suffix not in FORMS:
        raise ValueError(f"a report file must end in {', '.join(FORMS)}, got {path}")


def _plain_data(report: Report) -> str:
    return json.dumps(report.to_dict(), indent=1)
