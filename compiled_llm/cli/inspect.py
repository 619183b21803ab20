"""The work of `compiled-llm inspect`: examine a model by its config, without weights."""

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
    """Facts about a model, and what follows from them and a config.

    Attributes:
        summary: the facts about the model.
        dtype: name of the dtype of weights and caches.
        device: name of the device.
        bytes_per_parameter: size of the dtype.
        limits: the limits that an engine would have.
        expected: for each pass that is on, the number of matches it must make; 0 for any number.
    """

    summary: ModelSummary
    dtype: str
    device: str
    bytes_per_parameter: int
    limits: Limits
    expected: dict[str, int]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in layers that keep all tokens."""
        return sum(layer.bytes_per_token for layer in self.summary.layers if layer.reach.is_full)

    @property
    def bytes_of_windows(self) -> int:
        """Bytes of a long sequence's keys and values in layers with windows or chunks."""
        return sum(layer.reach.size * layer.bytes_per_token for layer in self.summary.layers)

    @property
    def bytes_of_states(self) -> int:
        """Bytes of a sequence's recurrent states, whatever its length."""
        return sum(state.num_bytes for state in self.summary.states)

    def __str__(self) -> str:
        """Return a line for each fact."""
        lines = {
            "model": self._model(),
            "attention": self._attention(),
            "features": ", ".join(self.summary.features) or "none beyond causal attention",
            "KV cache": f"{self.bytes_per_token:,} bytes a token",
            "windows": _bytes_a_sequence(self.bytes_of_windows),
            "states": self._states(),
            "limits": self._limits(),
            "warning": self.limits.warning or "",
            "passes": self._passes(),
        }
        return "\n".join(f"{name + ':':11}{text}" for name, text in lines.items() if text)

    def _model(self) -> str:
        num_parameters = self.summary.num_parameters
        weights = num_parameters * self.bytes_per_parameter / 2**20
        return (
            f"{self.summary.model_type}, {num_parameters:,} parameters, {weights:,.0f} MiB "
            f"in {self.dtype} on {self.device}"
        )

    def _attention(self) -> str:
        kinds = Counter(map(_describe, self.summary.layers))
        return "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"

    def _states(self) -> str:
        states = self.summary.states
        return f"{len(states)}, {_bytes_a_sequence(self.bytes_of_states)}" if states else ""

    def _limits(self) -> str:
        limits = self.limits
        return (
            f"{limits.max_num_seqs} sequences of up to {limits.max_model_len} tokens, "
            f"{limits.max_num_batched_tokens} tokens a step"
        )

    def _passes(self) -> str:
        passes = ", ".join(
            f"{name} {count}" if count else name for name, count in self.expected.items()
        )
        return f"{passes or 'none'} (with the number of matches that each must make)"


def inspect_model(config: Config) -> Inspection:
    """Examine the config's model; no weights are read.

    Raises:
        UnsupportedModelError: the model needs a feature that is not supported.
        NeedsWeightsError: the result depends on the weights.
        ValueError: the model does not exist, or the config does not fit it.
    """
    model_config = read_config(config.model)
    # A GPU that the config names need not exist here.
    is_cuda = config.model.device == "cuda"
    device = torch.device("cuda") if is_cuda else resolve_device(config.model)
    dtype = resolve_dtype(config.model, device)
    summary = examine_config(model_config, dtype, trust_remote_code=config.model.trust_remote_code)
    names = config.pass_order() if config.compile.dispatch != "eager" else []
    context = PassContext(
        num_tokens=2,
        facts=(
            AttentionLayers(tuple(layer.name for layer in summary.layers)),
            RotaryEmbeddings(summary.rotary_embeddings),
            PackedWeights(summary.merged_projections),
        ),
    )
    return Inspection(
        summary=summary,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        bytes_per_parameter=dtype.itemsize,
        limits=Limits.resolve(config.limits, model_config, device),
        expected={name: len(PASSES[name].expected(context)) for name in names},
    )


def _bytes_a_sequence(size: int) -> str:
    return f"{size:,} bytes a sequence" if size else ""


def _describe(layer: AttentionLayer) -> str:
    """Describe a layer's attention in words."""
    dims = f"{layer.key_dim}"
    if layer.key_dim != layer.value_dim:
        dims = f"{layer.key_dim} and {layer.value_dim}"
    heads = f"{layer.num_heads} heads, {layer.num_kv_heads} of keys and values"
    return f"{layer.reach}, {heads}, dim {dims}"
