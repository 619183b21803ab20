"""Tests of calls with a position per token, for models that accept or infer positions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compiled_llm.models.attention import CURRENT, AttentionCall
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.model_call import ModelCall
from tests.conftest import DEVICE
from tests.helpers.tiny_models import tiny_model


def _bart() -> torch.nn.Module:
    sizes = {
        "d_model": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "vocab_size": 64,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", **sizes)).to(DEVICE).eval()


@pytest.mark.parametrize(
    "make", [_bart, lambda: tiny_model("llama")], ids=["counts positions", "takes positions"]
)
def test_logits_depend_on_a_tokens_position_and_not_on_its_index(
    make: Callable[[], PreTrainedModel],
) -> None:
    model = make()
    ids, rows = (
        torch.tensor([11, 12, 13], device=DEVICE),
        torch.zeros(3, dtype=torch.int64, device=DEVICE),
    )
    forward = ModelCall(model)
    seen: list[torch.Tensor] = []

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Return each token's query plus its key."""
        seen.append(k)
        return (q + k.repeat_interleave(q.shape[1] // k.shape[1], 1)).transpose(1, 2).contiguous()

    with attention_routed(model), torch.no_grad():
        CURRENT.attention = attend
        try:
            row = forward(ids, torch.tensor([7, 0, 30], device=DEVICE), rows)
            alone = forward(ids[2:], torch.tensor([30], device=DEVICE), rows[2:])
            elsewhere = forward(ids[2:], torch.tensor([31], device=DEVICE), rows[2:])
            last = forward(
                ids,
                torch.tensor([7, 0, 30], device=DEVICE),
                rows,
                torch.tensor([2, 0], device=DEVICE),
            )
        finally:
            CURRENT.attention = None
    assert seen
    torch.testing.assert_close(row[2:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(elsewhere, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, row[[2, 0]], rtol=1e-4, atol=1e-5)
