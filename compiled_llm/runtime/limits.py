"""The most of each at once, with the defaults filled in."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from compiled_llm.config import LimitsConfig

_DEFAULTS = {"cpu": (4, 256, 2048), "cuda": (64, 2048, 4096)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sequences at once, tokens a step, and tokens a sequence (prompt and output together)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    @classmethod
    def resolve(cls, config: LimitsConfig, model_config: PretrainedConfig, device: torch.device) -> "Limits":
        """Fill in `auto`; raises ValueError when a sequence could outgrow the model's positions."""
        seqs, tokens, length = _DEFAULTS[device.type]
        positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        limits = cls(
            max_num_seqs=seqs if config.max_num_seqs == "auto" else config.max_num_seqs,
            max_num_batched_tokens=tokens if config.max_num_batched_tokens == "auto" else config.max_num_batched_tokens,
            max_model_len=min(length, positions or length) if config.max_model_len == "auto" else config.max_model_len,
        )
        if positions is not None and limits.max_model_len > positions:
            raise ValueError(f"limits.max_model_len={limits.max_model_len}, but the model has only {positions} positions: lower it")
        return limits
