"""LLM inference by compilation: any Hugging Face causal LM, unmodified, as a paged, CUDA-graphed inference engine."""

from compiled_llm import imported

# isort: split

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

imported.done()
