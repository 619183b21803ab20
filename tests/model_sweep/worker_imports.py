"""Imports that all worker processes share by forking."""

import torch
import transformers
from transformers.models.auto import modeling_auto  # noqa: F401

import compiled_llm
import compiled_llm.llm
import tests.model_sweep.check

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

__all__ = ["compiled_llm", "tests"]
