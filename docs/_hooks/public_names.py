"""MkDocs hook: list a package's public names in an API page.

`<!-- public names of PACKAGE: PATTERN -->` becomes a mkdocstrings block for each name in the
package's `__all__` that matches the pattern and has no block of its own on the page. `__all__` is
read from the source, so nothing is imported.
"""

import ast
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_MARKER = re.compile(r"<!-- public names of (\w+): (\S+) -->")
_ROOT = Path(__file__).parents[2]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page, from top to bottom."""
    while (found := _MARKER.search(markdown)) is not None:
        package, pattern = found.groups()
        listed = set(re.findall(rf"^::: {package}\.(\w+)$", markdown, re.MULTILINE))
        names = [name for name in public_names(package) if fnmatchcase(name, pattern)]
        blocks = [f"::: {package}.{name}" for name in names if name not in listed]
        markdown = markdown[: found.start()] + "\n\n".join(blocks) + markdown[found.end() :]
    return markdown


def public_names(package: str) -> list[str]:
    """Return the names in a package's `__all__`.

    Raises:
        ValueError: the package has no `__all__`, or one that is not a literal.
    """
    source = (_ROOT / package / "__init__.py").read_text()
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{package}/__init__.py has no __all__: expected a list of public names")
