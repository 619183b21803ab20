"""Recurrent states: what convolutions and recurrences keep of a sequence, one slot per row.

transformers keeps such states in the layers of its cache. A step gathers the slots of its rows into
cache layers, calls the model on them, and scatters them back. Rows at their first token start from
zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

StateKind = Literal["conv", "recurrent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentState:
    """One state of a cache layer.

    Attributes:
        layer: index of the cache layer.
        index: the state's key among those of its kind in the layer.
        kind: `conv` for the last inputs of a convolution, `recurrent` for a recurrence.
        shape: of one sequence's state.
        dtype: of the state.
    """

    layer: int
    index: int
    kind: StateKind
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one sequence's state."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def empty_state_cache(config: PretrainedConfig) -> Cache | None:
    """Return an empty cache for a model with recurrent states; None for a model without."""
    try:
        cache = DynamicCache(config=config)
    except (AttributeError, KeyError, TypeError, ValueError):  # the config lists no layers
        return None
    has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    return cache if has_states else None


def states_of(cache: Cache) -> list[RecurrentState]:
    """Return the states that a forward of one sequence has left in its cache."""
    states = []
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            continue
        states += _states_of_layer(number, "conv", layer.conv_states)
        states += _states_of_layer(number, "recurrent", layer.recurrent_states)
    return states


def _states_of_layer(
    layer: int, kind: StateKind, tensors: dict[int, Tensor | None]
) -> list[RecurrentState]:
    return [
        RecurrentState(
            layer=layer, index=index, kind=kind, shape=tuple(tensor.shape[1:]), dtype=tensor.dtype
        )
        for index, tensor in tensors.items()
        if tensor is not None
    ]


class RecurrentStates(nn.Module):
    """Buffers [R + 1, ...] with the states of R rows and of one more, the trash row of padding.

    Args:
        states: the states of the model.
        num_layers: layers of the model's cache.
        num_rows: R.
        device: where the buffers are allocated.
    """

    def __init__(
        self, states: Sequence[RecurrentState], num_layers: int, num_rows: int, device: torch.device
    ) -> None:
        super().__init__()
        self._states = tuple(states)
        self._num_layers = num_layers
        for number, state in enumerate(states):
            slots = torch.zeros(num_rows + 1, *state.shape, dtype=state.dtype, device=device)
            self.register_buffer(f"state_{number}", slots, persistent=False)

    @property
    def slots(self) -> list[Tensor]:
        """The buffers, in the order of the states."""
        return [getattr(self, f"state_{number}") for number in range(len(self._states))]

    def gather(self, rows: Tensor, known: Tensor) -> Cache:
        """Return a cache with the states of rows [B].

        Args:
            rows: [B] indices of rows.
            known: [B] tokens that each row's states include; where 0, the states are zeros.
        """
        with_states = {state.layer: StatesLayer() for state in self._states}
        for state, slots in zip(self._states, self.slots, strict=True):
            has_begun = (known > 0).view(-1, *[1] * len(state.shape))
            with_states[state.layer].put(state, torch.where(has_begun, slots[rows], 0))
        return Cache(
            layers=[
                with_states.get(number) or PassThroughLayer() for number in range(self._num_layers)
            ]
        )

    def scatter(self, rows: Tensor, cache: Cache) -> None:
        """Store the states in the cache as those of rows [B]."""
        for state, slots in zip(self._states, self.slots, strict=True):
            layer = cache.layers[state.layer]
            assert isinstance(layer, StatesLayer)
            is_conv = state.kind == "conv"
            tensors = layer.conv_states if is_conv else layer.recurrent_states
            updated = tensors[state.index]
            assert updated is not None
            slots[rows] = updated


class PassThroughLayer(CacheLayerMixin):
    """A cache layer that stores nothing, since attention calls use the engine's cache."""

    is_sliding = False

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return as many keys as queries, from the first one on."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0; the forward is given positions."""
        return 0

    def get_max_length(self) -> int:
        """Return -1, which stands for no limit."""
        return -1


class StatesLayer(LinearAttentionLayer, PassThroughLayer):  # type: ignore[override]
    """A cache layer with states that stores no keys and values."""

    def __init__(self) -> None:
        LinearAttentionLayer.__init__(self)

    def put(self, state: RecurrentState, rows: Tensor) -> None:
        """Set one state [B, ...] of the layer."""
        index = state.index
        if state.kind == "conv":
            self.conv_states[index] = rows
            self.conv_kernel_size[index] = state.shape[-1]
            self.is_conv_states_initialized[index] = True
        else:
            self.recurrent_states[index] = rows
            self.is_recurrent_states_initialized[index] = True
        self.has_previous_state[index] = True
