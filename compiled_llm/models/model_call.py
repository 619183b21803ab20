"""Call a model's forward on tokens that each have a position of their own.

Tokens of all sequences form one row. Most models accept positions. Some models, or parts of them,
infer positions from the length of their cache instead; they are given a cache whose length is a
tensor: for each token its position minus its index in the row. That cache stores nothing, since
attention calls use the engine's cache.

In a model with recurrent states, each sequence has states of its own; tokens then form a row each,
or all of them one sequence. Padding comes first in a sequence and is masked; it is used only before
a sequence's first token, where such models ignore it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from compiled_llm.models.recurrent_state import RecurrentStates


class ModelCall:
    """Calls a model with the arguments that its forward accepts.

    Args:
        model: the model.
        states: the model's recurrent states, or None.
    """

    def __init__(self, model: nn.Module, states: RecurrentStates | None = None) -> None:
        self._model = model
        self._states = states
        self._accepted = frozenset(inspect.signature(model.forward).parameters)

    def __call__(
        self, ids: Tensor, positions: Tensor, rows: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """Return the logits of T tokens of any sequences.

        Args:
            ids: [T] token ids.
            positions: [T] their positions.
            rows: [T] their sequences' rows in the states; with states, each token has another row.
            wanted: [S] indices of the tokens whose logits are returned; None for all.

        Returns:
            [T, V] or [S, V].
        """
        if self._states is None:
            # Without a mask, some models create one as long as the cache's length, a tensor here.
            mask = torch.ones_like(ids[None])
            cache = PositionsCache(positions)
            return self.call(ids[None], positions[None], cache, wanted, attention_mask=mask)[0]
        states = self._states.gather(rows, positions)
        logits = self.call(ids[:, None], positions[:, None], states)[:, 0]
        self._states.scatter(rows, states)
        return logits if wanted is None else logits[wanted]

    def sequence(
        self, ids: Tensor, positions: Tensor, row: Tensor, *, start: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the logits [T, V] of the next tokens of one sequence; for models with states.

        Args:
            ids: [T] token ids.
            positions: [T] their positions.
            row: [1] the sequence's row in the states.
            start: [1] tokens of the sequence that its states include.
            mask: [T] 0 for padding, which comes first, and only at the beginning of a sequence.
        """
        assert self._states is not None
        cache = self._states.gather(row, start)
        logits = self.call(ids[None], positions[None], cache, attention_mask=mask[None])
        self._states.scatter(row, cache)
        return logits[0]

    def call(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Cache,
        wanted: Tensor | None = None,
        **others: Tensor,
    ) -> Tensor:
        """Return the logits [B, T, V] or [B, S, V] of ids and positions [B, T].

        Arguments that the model's forward does not accept are left out.
        """
        offered: dict[str, Any] = {
            "position_ids": positions,
            "past_key_values": cache,
            "cache_params": cache,
            **others,
        }
        options = {name: value for name, value in offered.items() if name in self._accepted}
        gathers = wanted is not None and "logits_to_keep" in self._accepted
        if gathers:
            options["logits_to_keep"] = wanted
        logits: Tensor = self._model(input_ids=ids, use_cache=False, **options).logits
        return logits if gathers or wanted is None else logits[:, wanted]


class PositionsCache(Cache):
    """A cache that stores nothing and whose length gives models the positions [T] of tokens."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__(layers=[])
        self._lengths = positions - torch.arange(positions.shape[0], device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override]
        """Return [T], each token's position minus its index in the row."""
        return self._lengths

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return as many keys as queries, from the first one on."""
        return query_length, 0
