"""The layout of the packages: imports point one way, without circles, and files stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("compiled_llm", "passes")

# From the bottom up. A part may import the parts in its own layer and in the layers below it.
LAYERS = (
    ("passes", "errors"),
    ("system",),
    ("config",),
    ("sampling_params", "outputs"),
    ("report",),
    ("models",),
    ("runtime.buckets", "runtime.bucket_tuning", "runtime.limits"),
    ("runtime.step",),
    ("runtime.memory",),
    ("runtime.artifacts",),
    ("runtime.build_context",),
    ("runtime.compilation",),
    ("runtime.capture",),
    ("runtime.verify",),
    ("runtime",),  # modules that are in no part above, such as the model runner
    ("engine",),
    ("startup", "progress"),
    ("session",),
    ("llm",),
    ("engine_thread",),
    ("async_llm",),
    ("cli",),
    ("__main__",),
)
RANKS = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

MAX_FILE_LINES, MAX_CLASS_LINES, MAX_LINE_LENGTH = 300, 200, 100


@cache
def _modules() -> dict[str, Path]:
    """Return the files of the packages by the names of their modules."""
    modules = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            modules[name.removesuffix(".__init__")] = path
    return modules


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield the names of the modules that an import statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            member = f"{node.module}.{alias.name}"
            yield member if member in _modules() else str(node.module)


def _all_imports(path: Path) -> set[str]:
    return {name for node in ast.walk(_parse(path)) for name in _imported(node)}


def _imports_at_import(path: Path) -> set[str]:
    """Return the modules imported when a file is, so outside functions and TYPE_CHECKING."""

    def visit(node: ast.AST) -> Iterator[str]:
        yield from _imported(node)
        for child in ast.iter_child_nodes(node):
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            if not (deferred or typing):
                yield from visit(child)

    return {name for name in visit(_parse(path)) if name in _modules()}


def _part(module: str) -> str | None:
    """Return the part of a module; None for the package `compiled_llm` itself."""
    package, *names = module.split(".")
    if package == "passes":
        return "passes"
    if not names:
        return None
    nested = ".".join(names[:2])
    return nested if nested in RANKS else names[0]


def test_every_part_has_a_layer() -> None:
    parts = {part for module in _modules() if (part := _part(module)) is not None}
    assert not parts - set(RANKS), "add the part to LAYERS, where its imports allow"


def test_imports_point_downward() -> None:
    upward = [
        f"{module} imports {imported}"
        for module, path in sorted(_modules().items())
        for imported in sorted(_all_imports(path) & set(_modules()))
        if (part := _part(module)) is not None
        and (target := _part(imported)) is not None
        and RANKS[target] > RANKS[part]
    ]
    assert upward == []


def test_no_modules_import_each_other() -> None:
    graph = {module: _imports_at_import(path) for module, path in _modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_passes_and_system_stand_alone() -> None:
    for module, path in _modules().items():
        ours = {name for name in _all_imports(path) if name.split(".")[0] == "compiled_llm"}
        if module.startswith("passes"):
            assert not ours, module
        if module.startswith("compiled_llm.system"):
            allowed = ("compiled_llm.errors", "compiled_llm.system")
            assert all(name.startswith(allowed) for name in ours), module


def test_the_library_imports_neither_tests_nor_the_benchmarks() -> None:
    """Apart from the command line, which has the command `bench`."""
    for module, path in _modules().items():
        if _part(module) not in ("cli", "__main__"):
            assert not {name.split(".")[0] for name in _all_imports(path)} & {"tests", "bench"}


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import compiled_llm, compiled_llm.cli.main, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def _sources() -> Iterator[tuple[str, str]]:
    for package in (*PACKAGES, "bench", "tests"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()


def test_files_are_small() -> None:
    counts = {name: len(source.splitlines()) for name, source in _sources()}
    large = [f"{name}: {count}" for name, count in counts.items() if count > MAX_FILE_LINES]
    assert not large, "\n".join(large)


def test_classes_are_small() -> None:
    counts = {
        f"{name}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, source in _sources()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }
    large = [f"{name}: {count}" for name, count in counts.items() if count > MAX_CLASS_LINES]
    assert not large, "\n".join(large)


def test_lines_are_short() -> None:
    """A line that cannot be broken, because it ends with a URL, may be longer."""
    long = [
        f"{name}:{number}"
        for name, source in _sources()
        for number, line in enumerate(source.splitlines(), 1)
        if len(line) > MAX_LINE_LENGTH and "https://" not in line.rsplit(maxsplit=1)[-1]
    ]
    assert not long, "\n".join(long)
