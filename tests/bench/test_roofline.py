"""Bytes that a decode step reads, and the measured bandwidth."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.roofline import measure_bandwidth, measure_roofline, read_sums, weight_bytes
from tests.bench.local import fake_roofline, tiny_config
from tests.conftest import DEVICE
from tests.helpers.tiny_models import tiny_model


def test_roofline_of_a_tiny_model(tmp_path: Path) -> None:
    roofline = measure_roofline(tiny_config(tmp_path))
    assert roofline.model == "LlamaForCausalLM"
    assert (roofline.device, roofline.dtype, roofline.vocab_size) == ("cpu", "float32", 160)
    assert roofline.weight_bytes == 4 * (roofline.parameters - 160 * 64), (
        "one row of the input embedding is read, and all rows of the output's"
    )
    assert roofline.kv_bytes == 2 * 2 * 2 * 16 * 4
    assert (roofline.max_num_seqs, roofline.max_num_batched_tokens) == (4, 64)
    assert roofline.max_model_len == 128
    assert roofline.ceiling == pytest.approx(roofline.read_bandwidth / roofline.weight_bytes)
    assert len(roofline.lines()) == 6


def test_tied_embedding_is_read_as_the_output() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert weight_bytes(model) == sum(p.numel() * p.element_size() for p in model.parameters())


def test_only_routed_experts_count() -> None:
    model = tiny_model("gpt_oss")
    experts = sum(p.numel() * 4 for p in model.parameters() if p.dim() == 3)
    others = sum(p.numel() * 4 for p in model.parameters() if p.dim() != 3) - 160 * 64 * 4
    assert experts > 0
    assert weight_bytes(model) == pytest.approx(others + experts / 2)


def test_bandwidth_is_measured() -> None:
    copy, read = measure_bandwidth(DEVICE, num_bytes=2**20, repeats=3)
    assert copy > 1e6
    assert read > 1e6


@pytest.mark.gpu
def test_reading_kernel_reads_all_elements() -> None:
    x = torch.arange(20000, dtype=torch.float32, device=DEVICE)
    torch.testing.assert_close(read_sums(x).double().sum(), x.double().sum())


def test_minimum_step_reads_the_weights_and_all_caches() -> None:
    assert fake_roofline().min_step_ms(2, 100) == pytest.approx((4000 + 2 * 100 * 16) / 1e6 * 1e3)


def test_unknown_kv_bytes_count_as_none() -> None:
    assert fake_roofline(kv_bytes=None).min_step_ms(2, 100) == pytest.approx(4.0)
    assert ("KV cache per token", "unknown") in fake_roofline(kv_bytes=None).lines()


def test_weight_bytes_of_a_model_without_memory() -> None:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama"))
    assert weight_bytes(model) > 10**10
