"""The card: what a model's decode step reads, and how fast the machine could read it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.roofline import make_card, measure_bandwidth, read_sums, weight_bytes
from tests.bench.local import made_up_card, tiny_config
from tests.conftest import DEVICE
from tests.helpers.tiny_models import tiny_model


def test_a_card_of_a_tiny_model(tmp_path: Path) -> None:
    card = make_card(tiny_config(tmp_path))
    assert (card.model, card.device, card.dtype, card.vocab_size) == (
        "LlamaForCausalLM",
        "cpu",
        "float32",
        160,
    )
    assert card.weight_bytes == 4 * (card.parameters - 160 * 64), (
        "one row of the input embedding is read, and all of the output's"
    )
    assert card.kv_bytes == 2 * 2 * 2 * 16 * 4
    assert (card.max_num_seqs, card.max_num_batched_tokens, card.max_model_len) == (4, 64, 128)
    assert card.ceiling == pytest.approx(card.read_bandwidth / card.weight_bytes)
    assert len(card.lines()) == 6


def test_a_tied_embedding_is_read_as_the_output() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert weight_bytes(model) == sum(p.numel() * p.element_size() for p in model.parameters())


def test_of_experts_only_the_chosen_are_read() -> None:
    model = tiny_model("gpt_oss")
    routed = sum(p.numel() * 4 for p in model.parameters() if p.dim() == 3)
    others = sum(p.numel() * 4 for p in model.parameters() if p.dim() != 3) - 160 * 64 * 4
    assert routed > 0
    assert weight_bytes(model) == pytest.approx(others + routed / 2)


def test_bandwidth_is_measured() -> None:
    copied, read = measure_bandwidth(DEVICE, num_bytes=2**20, repeats=3)
    assert copied > 1e6
    assert read > 1e6


@pytest.mark.gpu
def test_the_reading_kernel_reads_everything() -> None:
    x = torch.arange(20000, dtype=torch.float32, device=DEVICE)
    torch.testing.assert_close(read_sums(x).double().sum(), x.double().sum())


def test_a_step_reads_the_weights_and_every_sequence_s_cache() -> None:
    assert made_up_card().least_ms(2, 100) == pytest.approx((4000 + 2 * 100 * 16) / 1e6 * 1e3)


def test_parameters_need_no_memory() -> None:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama"))
    assert weight_bytes(model) > 10**10
