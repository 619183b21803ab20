"""Limits of a batch and of a sequence, with the defaults filled in."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from compiled_llm.config.schema import LimitsConfig
from compiled_llm.models.rotary import rotary_limit

# max_num_seqs, max_num_batched_tokens, max_model_len
_DEFAULTS = {"cpu": (4, 256, 2048), "cuda": (64, 2048, 4096)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of an engine.

    Attributes:
        max_num_seqs: sequences in a batch.
        max_num_batched_tokens: tokens in a step.
        max_model_len: tokens of a sequence, prompt and output together.
        warning: why `max_model_len` is below the default, if the model's rotary embedding is the
            reason.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    warning: str | None = None

    @classmethod
    def resolve(
        cls, config: LimitsConfig, model_config: PretrainedConfig, device: torch.device
    ) -> "Limits":
        """Replace `auto` by the device's defaults, as far as the model allows.

        Raises:
            ValueError: `limits.max_model_len` exceeds what the model supports.
        """
        seqs, tokens, default = _DEFAULTS[device.type]
        positions = _num_positions(model_config)
        default = min(default, positions or default)
        if config.max_model_len == "auto":
            length, warning = _automatic_length(model_config, default)
        else:
            length, warning = config.max_model_len, None
            _check_length(model_config, length, positions)
        if config.max_num_seqs != "auto":
            seqs = config.max_num_seqs
        if config.max_num_batched_tokens != "auto":
            tokens = config.max_num_batched_tokens
        return cls(
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_model_len=length,
            warning=warning,
        )


def _num_positions(config: PretrainedConfig) -> int | None:
    """Return the number of positions under either of its names in configs, or None."""
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    return positions or getattr(text, "max_target_positions", None)


def _automatic_length(config: PretrainedConfig, default: int) -> tuple[int, str | None]:
    limit = rotary_limit(config)
    if limit is None or default <= limit.length:
        return default, None
    return limit.length, (
        f"limits.max_model_len is {limit.length} instead of {default}: beyond {limit.length} "
        f"tokens, rope_type {limit.rope_type!r} changes its frequencies for all sequences of a "
        "batch"
    )


def _check_length(config: PretrainedConfig, length: int, positions: int | None) -> None:
    limit = rotary_limit(config)
    if limit is not None and length > limit.length:
        raise ValueError(
            f"limits.max_model_len={length}, but beyond {limit.length} tokens, rope_type "
            f"{limit.rope_type!r} changes its frequencies for all sequences of a batch, which is "
            f"not supported: lower it to {limit.length}, or use auto"
        )
    if positions is not None and length > positions:
        raise ValueError(
            f"limits.max_model_len={length}, but the model has only {positions} positions: lower it"
        )
