"""What an engine would do with a model, told from its config alone: `compiled-llm inspect`."""

from collections import Counter
from dataclasses import dataclass

import torch

from compiled_llm.config.schema import Config
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.models.loading import read_config, resolve_device, resolve_dtype
from compiled_llm.models.preflight import ModelSummary, examine_config
from compiled_llm.runtime.limits import Limits
from passes import PASSES, AttentionLayers, PackedWeights, PassContext, RotaryEmbeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is found of a model, and what follows from it and a config.

    Attributes:
        dtype, device: of weights and caches, in words.
        expected: for each pass that is on, how many matches it must make; 0 where it takes what there is.
    """

    found: ModelSummary
    dtype: str
    device: str
    bytes_per_parameter: int
    limits: Limits
    expected: dict[str, int]

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values in layers that keep all tokens."""
        return sum(layer.bytes_per_token for layer in self.found.layers if layer.reach.is_full)

    @property
    def bytes_of_windows(self) -> int:
        """Of keys and values that layers with windows or chunks keep of a sequence that outgrows them."""
        return sum(layer.reach.size * layer.bytes_per_token for layer in self.found.layers)

    @property
    def bytes_of_states(self) -> int:
        """Of a sequence's states, however long it is."""
        return sum(state.num_bytes for state in self.found.states)

    def __str__(self) -> str:
        found, limits = self.found, self.limits
        weights = found.num_parameters * self.bytes_per_parameter / 2**20
        sequences = f"{limits.max_num_seqs} sequences of up to {limits.max_model_len} tokens, {limits.max_num_batched_tokens} tokens a step"
        passes = ", ".join(
            f"{name} {count}" if count else name for name, count in self.expected.items()
        )
        place = f"{weights:,.0f} MiB in {self.dtype} on {self.device}"
        lines = {
            "model": f"{found.model_type}, {found.num_parameters:,} parameters, {place}",
            "attention": "; ".join(
                f"{count} x {kind}" for kind, count in Counter(map(_kind, found.layers)).items()
            )
            or "none",
            "features": ", ".join(found.features) or "none beyond causal attention",
            "KV cache": f"{self.bytes_per_token:,} bytes a token",
            "windows": f"{self.bytes_of_windows:,} bytes a sequence"
            if self.bytes_of_windows
            else "",
            "states": f"{len(found.states)}, {self.bytes_of_states:,} bytes a sequence"
            if found.states
            else "",
            "limits": sequences,
            "warning": limits.warning or "",
            "passes": f"{passes or 'none'} (and how many matches each must make)",
        }
        return "\n".join(f"{name + ':':11}{text}" for name, text in lines.items() if text)


def inspect_model(config: Config) -> Inspection:
    """Examine what the config names; no weights are read.

    Raises:
        UnsupportedModelError: the model is not served; the message names the feature.
        UndecidedError: only its weights can tell.
        ValueError: there is no such model, or the config does not fit it.
    """
    model_config = read_config(config.model)
    device = (
        torch.device("cuda") if config.model.device == "cuda" else resolve_device(config.model)
    )  # which need not be here
    dtype = resolve_dtype(config.model, device)
    found = examine_config(model_config, dtype, trust_remote_code=config.model.trust_remote_code)
    names = config.pass_order() if config.compile.dispatch != "eager" else []
    context = PassContext(
        num_tokens=2,
        facts=(
            AttentionLayers(tuple(layer.name for layer in found.layers)),
            RotaryEmbeddings(found.rotary_embeddings),
            PackedWeights(found.merged_projections),
        ),
    )
    return Inspection(
        found=found,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        bytes_per_parameter=dtype.itemsize,
        limits=Limits.resolve(config.limits, model_config, device),
        expected={name: len(PASSES[name].expected(context)) for name in names},
    )


def _kind(layer: AttentionLayer) -> str:
    """A layer's attention, in words."""
    dims = (
        f"{layer.key_dim}"
        if layer.key_dim == layer.value_dim
        else f"{layer.key_dim} and {layer.value_dim}"
    )
    return f"{layer.reach}, {layer.num_heads} heads, {layer.num_kv_heads} of keys and values, dim {dims}"
