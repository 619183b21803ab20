"""One call of a model's forward on tokens, each with a position of its own, whatever arguments the model takes.

Tokens travel as one row, whatever sequences they are of. Most models take positions. Some, or parts of some, count them from the
length of their cache instead; so they are given a cache whose length is a tensor: for each token what its place in the row lacks to
its position. It caches nothing, since attention happens elsewhere.

In a model with states (see `states`), which are of one sequence each, tokens travel as a row each, or all as one sequence. What
pads a sequence comes first and is masked, and only at its beginning, where such models take it for nothing.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from compiled_llm.models.recurrent_state import RecurrentStates


class ModelCall:
    """Calls a model on T tokens."""

    def __init__(self, model: nn.Module, states: RecurrentStates | None = None) -> None:
        self._model, self._states = model, states
        self._accepted = frozenset(inspect.signature(model.forward).parameters)

    def __call__(
        self, ids: Tensor, positions: Tensor, rows: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """Logits of the tokens.

        Args:
            ids, positions, rows: [T]; with states, each has a row of its own.
            wanted: [S] the indices of those whose logits are wanted, or None for all.

        Returns:
            [T, V] or [S, V].
        """
        if self._states is None:
            mask = torch.ones_like(
                ids[None]
            )  # without one, some make one as long as the cache says it is
            return self.call(
                ids[None], positions[None], PositionsCache(positions), wanted, attention_mask=mask
            )[0]
        cache = self._states.gather(rows, positions)
        logits = self.call(ids[:, None], positions[:, None], cache)[:, 0]
        self._states.scatter(rows, cache)
        return logits if wanted is None else logits[wanted]

    def sequence(
        self, ids: Tensor, positions: Tensor, row: Tensor, *, start: Tensor, mask: Tensor
    ) -> Tensor:
        """Logits [T, V] of the next tokens of one sequence of a model with states.

        Args:
            ids, positions: [T].
            row, start: [1], of the sequence, and how many of its tokens its states know.
            mask: [T] 0 for what pads it, which comes first, and only at the beginning of a sequence.
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
        """Logits [B, T, V] or [B, S, V] of ids and positions [B, T]; what the model does not take, it is not given."""
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
    """What a model that counts positions from the length of its cache is given: positions [T]."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__(layers=[])
        self._lengths = positions - torch.arange(positions.shape[0], device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override]
        """[T] what a token's place in the row lacks to its position."""
        return self._lengths

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values alone."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As many keys as queries, from the first on."""
        return query_length, 0
