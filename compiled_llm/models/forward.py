"""One call of a model's forward on a row of tokens, each with a position of its own, whatever arguments the model takes.

Most models take positions. Some, or parts of some, count them from the length of their cache instead; so they are given a
cache whose length is a tensor: for each token what its place in the row lacks to its position. It caches nothing, since attention
happens elsewhere.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


class Forward:
    """Calls a model on tokens: ids and positions [1, T], and the indices [S] of those whose logits are wanted, or None for all."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._accepted = frozenset(inspect.signature(model.forward).parameters)

    def __call__(self, ids: Tensor, positions: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Logits [1, T, V], or [1, S, V]."""
        offered: dict[str, Any] = {
            "past_key_values": PositionsCache(positions),
            "position_ids": positions,
            "attention_mask": torch.ones_like(ids),  # without one, some make one as long as the cache says it is
        }
        options = {name: value for name, value in offered.items() if name in self._accepted}
        gathers = wanted is not None and "logits_to_keep" in self._accepted
        if gathers:
            options["logits_to_keep"] = wanted
        logits: Tensor = self._model(input_ids=ids, use_cache=False, **options).logits
        return logits if gathers or wanted is None else logits[:, wanted]


class PositionsCache(Cache):
    """What a model that counts positions from the length of its cache is given: positions [1, T]."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__(layers=[])
        self._lengths = positions[0] - torch.arange(positions.shape[1], device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override]
        """[T] what a token's place in the row lacks to its position."""
        return self._lengths

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As many keys as queries, from the first on."""
        return query_length, 0
