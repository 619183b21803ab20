"""What layers other than attention remember of a sequence: the states of convolutions and recurrences, one slot for each row.

transformers keeps such states in the layers of its cache. A step gathers the slots of its rows into cache layers of transformers'
own, calls the model on them, and puts them back; rows at their first token start from zeros.
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

Kind = Literal["conv", "recurrent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentState:
    """One state of a cache layer: `index` is its number there, `shape` is that of one sequence."""

    layer: int
    index: int
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of one row."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def empty_state_cache(config: PretrainedConfig) -> Cache | None:
    """An empty cache for a model with states; None for one without."""
    try:
        cache = DynamicCache(config=config)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ):  # a config that says nothing of its layers
        return None
    return (
        cache
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
        else None
    )


def states_of(cache: Cache) -> list[RecurrentState]:
    """The states that a forward of one sequence left in its cache."""
    states = []
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            kinds: list[tuple[Kind, dict[int, Tensor | None]]] = [
                ("conv", layer.conv_states),
                ("recurrent", layer.recurrent_states),
            ]
            for kind, held in kinds:
                for index, tensor in held.items():
                    if tensor is not None:
                        states.append(
                            RecurrentState(
                                layer=number,
                                index=index,
                                kind=kind,
                                shape=tuple(tensor.shape[1:]),
                                dtype=tensor.dtype,
                            )
                        )
    return states


class RecurrentStates(nn.Module):
    """The states of R rows and one more, the trash row, as buffers [R + 1, ...] in the order of `states`."""

    def __init__(
        self, states: Sequence[RecurrentState], num_layers: int, num_rows: int, device: torch.device
    ) -> None:
        super().__init__()
        self._states, self._num_layers = tuple(states), num_layers
        for number, state in enumerate(states):
            slots = torch.zeros(num_rows + 1, *state.shape, dtype=state.dtype, device=device)
            self.register_buffer(f"state_{number}", slots, persistent=False)

    @property
    def slots(self) -> list[Tensor]:
        """The buffers."""
        return [getattr(self, f"state_{number}") for number in range(len(self._states))]

    def gather(self, rows: Tensor, known: Tensor) -> Cache:
        """The states of these rows [B], as a cache; zeros where `known` [B], the tokens that they know, is 0."""
        with_states = {state.layer: StatesLayer() for state in self._states}
        for state, slots in zip(self._states, self.slots, strict=True):
            begun = (known > 0).view(-1, *[1] * len(state.shape))
            with_states[state.layer].put(state, torch.where(begun, slots[rows], 0))
        return Cache(
            layers=[with_states.get(number) or PassingLayer() for number in range(self._num_layers)]
        )

    def scatter(self, rows: Tensor, cache: Cache) -> None:
        """Keep what the cache holds now."""
        for state, slots in zip(self._states, self.slots, strict=True):
            layer = cache.layers[state.layer]
            assert isinstance(layer, StatesLayer)
            held = (layer.conv_states if state.kind == "conv" else layer.recurrent_states)[
                state.index
            ]
            assert held is not None
            slots[rows] = held


class PassingLayer(CacheLayerMixin):
    """A cache layer that lets keys and values pass, since attention happens elsewhere."""

    is_sliding = False

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """There is nothing to initialise."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many keys as queries, from the first on."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Positions are given."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class StatesLayer(LinearAttentionLayer, PassingLayer):  # type: ignore[override]
    """The same, and states that are there already."""

    def __init__(self) -> None:
        LinearAttentionLayer.__init__(self)

    def put(self, state: RecurrentState, rows: Tensor) -> None:
        """Let the layer hold this state [B, ...]."""
        if state.kind == "conv":
            self.conv_states[state.index], self.conv_kernel_size[state.index] = (
                rows,
                state.shape[-1],
            )
            self.is_conv_states_initialized[state.index] = True
        else:
            (
                self.recurrent_states[state.index],
                self.is_recurrent_states_initialized[state.index],
            ) = rows, True
        self.has_previous_state[state.index] = True
