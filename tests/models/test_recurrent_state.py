"""Tests of recurrent states: found, stored per row, and zeroed for the next sequence."""

import pytest
import torch

from compiled_llm import CompiledLLM
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import (
    discover_attention_layers,
)
from compiled_llm.models.state_discovery import (
    allocate_states,
    discover_states,
    supports_state_continuation,
)
from compiled_llm.models.token_independence import check_token_independence
from tests.conftest import DEVICE
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config
from tests.helpers.tiny_models import tiny_model as llama_like
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as random_model

EAGER = {"compile": {"dispatch": "eager"}}


def _model(model_type: str):  # type: ignore[no-untyped-def]
    return random_model(tiny_config(model_type)).to(DEVICE)


def test_states_are_found() -> None:
    model = _model("lfm2")
    with attention_routed(model):
        (state,) = discover_states(model)
        assert (state.layer, state.kind, state.shape) == (0, "conv", (64, 3))
        assert state.num_bytes == 4 * 64 * 3
        assert len(discover_attention_layers(model)) == 1
        check_token_independence(model, 128)
        assert supports_state_continuation(model)
    with attention_routed(llama := llama_like("llama")):
        assert discover_states(llama) == []
        assert allocate_states(llama, 4) is None


def test_a_model_that_cannot_continue_with_a_chunk_is_detected() -> None:
    model = _model("mamba")
    with attention_routed(model):
        assert not supports_state_continuation(model)


def test_rows_keep_their_states_and_start_from_zeros() -> None:
    model = _model("lfm2")
    with attention_routed(model), torch.no_grad():
        states = allocate_states(model, 3)
    assert states is not None
    rows, known = torch.tensor([2, 0], device=DEVICE), torch.tensor([5, 5], device=DEVICE)
    cache = states.gather(rows, known)
    cache.layers[0].conv_states[0].copy_(
        torch.stack([torch.full((64, 3), 7.0), torch.full((64, 3), 8.0)])
    )
    states.scatter(rows, cache)
    again = states.gather(
        torch.tensor([0, 1, 2, 2], device=DEVICE), torch.tensor([5, 5, 5, 0], device=DEVICE)
    )
    assert again.layers[0].conv_states[0][:, 0, 0].tolist() == [8.0, 0.0, 7.0, 0.0]


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next", "mamba", "falcon_h1"])
def test_requests_do_not_affect_each_other(model_type: str) -> None:
    """With more requests than rows and few blocks, rows and states are reused."""
    model = _model(model_type)
    reference = Reference(model)
    prompts = [prompt_of(length, seed=1) for length in (5, 40, 17, 33, 3, 48, 20)]
    expected = [reference(prompt, 24) for prompt in prompts]
    with attention_routed(model):
        bytes_per_token = sum(layer.bytes_per_token for layer in discover_attention_layers(model))
    config = small_config(**EAGER, cache={"memory": 10 * 16 * (bytes_per_token or 1)})
    with CompiledLLM(model, None, config, progress=False) as llm:
        assert greedy(llm, prompts, 24) == expected
        report = llm.report()
        llm.engine.cache.check()
        assert (report.scheduling.preemptions > 0) == bool(llm.model_runner.memory.groups), (
            "without pages, nobody lacks one"
        )
    assert any("has recurrent states" in warning for warning in report.warnings)
    assert report.scheduling.cached_tokens == 0
