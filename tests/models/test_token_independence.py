"""Tests that tokens which interact outside attention are detected; see also test_rotary.py."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compiled_llm.errors import UnsupportedModelError
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.token_independence import check_token_independence
from tests.helpers.tiny_models import tiny_model


def _gptj() -> torch.nn.Module:
    """Return a model that computes attention itself and is not exported."""
    config = AutoConfig.for_model(
        "gptj", vocab_size=64, n_embd=32, n_head=4, n_layer=2, rotary_dim=4
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_tokens_must_interact_in_attention_alone() -> None:
    """Logits reveal attention outside the interface and positions inferred by the model."""
    mixed = _gptj()
    with (
        pytest.raises(UnsupportedModelError, match="gptj: its tokens interact outside"),
        attention_routed(mixed),
    ):
        check_token_independence(mixed, 128)
    model = tiny_model("llama")
    with attention_routed(model):
        check_token_independence(model, 128)
