"""Tests of the sizes of embedding and output head."""

import pytest
import torch
from torch import nn

from compiled_llm import CompiledLLM
from compiled_llm.errors import UnsupportedModelError
from compiled_llm.models import preflight
from compiled_llm.models.preflight import check_supported
from compiled_llm.models.vocabulary import check_vocabulary, num_embeddings, vocab_size
from tests.helpers.tiny_models import small_config, tiny_model
from tests.model_sweep.tiny_configs import tiny_config

MESSAGE = "llama: expected an output head of at most as many rows as .* has, 160, got 168"


def test_the_sizes_are_those_of_the_weights() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(64, 152, bias=False)
    assert (num_embeddings(model), vocab_size(model)) == (160, 152)
    check_vocabulary(model)


def test_a_head_larger_than_the_embedding_is_refused() -> None:
    """A sampled id of the last rows could not be embedded in the next step."""
    model = tiny_model("llama")
    model.lm_head = nn.Linear(64, 168, bias=False)
    with pytest.raises(UnsupportedModelError, match=MESSAGE):
        CompiledLLM(model, None, small_config(compile={"dispatch": "eager"}), progress=False)


def test_a_config_is_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    create = preflight.AutoModelForCausalLM.from_config

    def with_larger_head(*arguments: object, **options: object) -> nn.Module:
        model = create(*arguments, **options)
        model.lm_head = nn.Linear(config.hidden_size, config.vocab_size + 8, bias=False)
        return model

    monkeypatch.setattr(preflight.AutoModelForCausalLM, "from_config", with_larger_head)
    with pytest.raises(UnsupportedModelError, match="llama: expected an output head"):
        check_supported(config, torch.float32)
