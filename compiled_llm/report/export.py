"""Write a report to a file, in the format of its suffix."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from compiled_llm.report.html import render_html
from compiled_llm.report.report import Report
from compiled_llm.system.atomic_file import write_atomic


def _render_json(report: Report) -> str:
    return json.dumps(report.to_dict(), indent=1)


FORMATS: dict[str, Callable[[Report], str]] = {
    ".html": render_html,
    ".json": _render_json,
    ".txt": str,
}


def write_report(report: Report, path: Path) -> None:
    """Write an HTML page with plots (.html), plain data (.json) or tables (.txt).

    Raises:
        ValueError: the suffix is another one, or the file cannot be written.
    """
    check_report_path(path)
    try:
        write_atomic(path, FORMATS[path.suffix](report).encode())
    except OSError as error:
        raise ValueError(f"the report cannot be written to {path}: {error.strerror}") from None


def output_report(report: Report, *, printed: bool, file: Path | None) -> None:
    """Print a report on standard error, write it to a file, or both."""
    if printed:
        print(report, file=sys.stderr)
    if file is not None:
        write_report(report, file)


def check_report_path(path: Path | None) -> None:
    """Raise ValueError if no report can have this path's suffix."""
    if path is not None and path.suffix not in FORMATS:
        raise ValueError(f"a report file must end in {', '.join(FORMATS)}, got {path}")
