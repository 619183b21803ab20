"""LLM inference by compilation: any Hugging Face causal LM, unmodified, as a paged, CUDA-graphed inference engine."""

from compiled_llm.api import CompiledLLM
from compiled_llm.config import Config, load_config
from compiled_llm.engine.sampling_params import SamplingParams
from compiled_llm.models.attention import UnsupportedModelError
from compiled_llm.outputs import CompletionOutput, RequestOutput

__all__ = ["CompiledLLM", "CompletionOutput", "Config", "RequestOutput", "SamplingParams", "UnsupportedModelError", "load_config"]
