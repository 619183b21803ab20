"""Find the recurrent states of a model by running it once on a few tokens."""

from compiled_llm.models.exported_model import ServedModel
from compiled_llm.models.probe import alike, attend_to_self, forward, forward_row, probing
from compiled_llm.models.recurrent_state import (
    RecurrentState,
    RecurrentStates,
    empty_state_cache,
    states_of,
)


def discover_states(model: ServedModel) -> list[RecurrentState]:
    """Return the recurrent states that layers of a routed model keep of a sequence."""
    cache = empty_state_cache(model.config)
    if cache is None:
        return []
    with probing(model, attend_to_self):
        forward(model, [[0] * 4], cache, [[0, 1, 2, 3]])
    return states_of(cache)


def allocate_states(model: ServedModel, num_rows: int) -> RecurrentStates | None:
    """Allocate the states of `num_rows` sequences; return None where the model has no states."""
    cache = empty_state_cache(model.config)
    if cache is None:
        return None
    return RecurrentStates(discover_states(model), len(cache.layers), num_rows, model.device)


def supports_state_continuation(model: ServedModel) -> bool:
    """Return whether a chunk of several tokens can continue from the states of earlier tokens.

    Some models use their states only for single tokens, and ignore them for longer chunks. The
    result is True for a model without states.
    """
    cache = empty_state_cache(model.config)
    if cache is None:
        return True
    with probing(model, attend_to_self):
        whole = forward_row(model, [1, 2, 3, 4])[2:].float()
        forward(model, [[1, 2]], cache, [[0, 1]])
        rest = forward(model, [[3, 4]], cache, [[2, 3]])[0].float()
    return alike(whole, rest, model.dtype)
