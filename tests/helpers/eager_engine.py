"""A small engine that runs its steps eagerly."""

from typing import Any

from compiled_llm import CompiledLLM
from tests.helpers.tiny_models import (
    small_config,
    tiny_model,
)


def eager_llm(limits: dict[str, Any]) -> CompiledLLM:
    config = small_config(limits=limits, buckets={"decode": "auto"}, compile={"dispatch": "eager"})
    return CompiledLLM(tiny_model("llama"), None, config, progress=False)
