"""LLM inference by compilation: any Hugging Face causal LM, unmodified, as a paged, CUDA-graphed inference engine.

The first use of a name imports the library, and torch with it, which takes seconds; importing the package alone takes none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compiled_llm.imported import importing

if TYPE_CHECKING:
    from compiled_llm.api import CompiledLLM
    from compiled_llm.async_api import AsyncCompiledLLM
    from compiled_llm.config import Config
    from compiled_llm.config_file import load_config
    from compiled_llm.engine.engine import QueueFullError
    from compiled_llm.engine.outputs import CompletionOutput, RequestOutput
    from compiled_llm.engine.sampling_params import SamplingParams
    from compiled_llm.models.attention import UnsupportedModelError

__all__ = [
    "AsyncCompiledLLM",
    "CompiledLLM",
    "CompletionOutput",
    "Config",
    "QueueFullError",
    "RequestOutput",
    "SamplingParams",
    "UnsupportedModelError",
    "load_config",
]

_MODULES = {
    "AsyncCompiledLLM": "async_api",
    "CompiledLLM": "api",
    "CompletionOutput": "engine.outputs",
    "Config": "config",
    "QueueFullError": "engine.engine",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "engine.sampling_params",
    "UnsupportedModelError": "models.attention",
    "load_config": "config_file",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importing():
        found = {each: getattr(import_module(f"{__name__}.{module}"), each) for each, module in _MODULES.items()}
    globals().update(found)
    return found[name]


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
