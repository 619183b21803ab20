"""Loads the hooks of the documentation's build, which are in no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

_HOOKS = Path(__file__).parents[2] / "docs" / "_hooks"


def load_hook(name: str) -> ModuleType:
    """Return the hook of this name, executed."""
    spec = importlib.util.spec_from_file_location(name, _HOOKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
