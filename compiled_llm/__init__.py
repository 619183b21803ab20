"""LLM inference by compilation: an unmodified Hugging Face causal LM as a compiled, paged engine.

Public names are imported when first used: importing torch takes seconds, and only the engine's
classes need it.
"""

import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from compiled_llm.async_llm import AsyncCompiledLLM
    from compiled_llm.config.loader import load_config
    from compiled_llm.config.schema import Config
    from compiled_llm.errors import (
        CaptureError,
        CompiledLLMError,
        EngineBrokenError,
        QueueFullError,
        RequestFailedError,
        StrictError,
        UnsupportedModelError,
    )
    from compiled_llm.llm import CompiledLLM
    from compiled_llm.outputs import CompletionOutput, RequestOutput
    from compiled_llm.sampling_params import SamplingParams

__all__ = [
    "AsyncCompiledLLM",
    "CaptureError",
    "CompiledLLM",
    "CompiledLLMError",
    "CompletionOutput",
    "Config",
    "EngineBrokenError",
    "QueueFullError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "StrictError",
    "UnsupportedModelError",
    "load_config",
]

_MODULES = {
    "AsyncCompiledLLM": "async_llm",
    "CompiledLLM": "llm",
    "CompletionOutput": "outputs",
    "Config": "config.schema",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "load_config": "config.loader",
    "CaptureError": "errors",
    "CompiledLLMError": "errors",
    "EngineBrokenError": "errors",
    "QueueFullError": "errors",
    "RequestFailedError": "errors",
    "StrictError": "errors",
    "UnsupportedModelError": "errors",
}

import_seconds = 0.0  # of the imports that the first use of a public name makes


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    global import_seconds
    began = time.perf_counter()
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    import_seconds += time.perf_counter() - began
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})


def _version() -> str:
    """Return the version of the installed package, or "unknown" where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("compiled-llm")
    except PackageNotFoundError:
        return "unknown"
