"""Directories of the user that the library writes to."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache directory: $COMPILED_LLM_CACHE, else compiled_llm in $XDG_CACHE_HOME."""
    chosen = os.environ.get("COMPILED_LLM_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "compiled_llm"
