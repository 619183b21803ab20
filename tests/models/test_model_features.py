"""Tests of the list of a model's features."""

import pytest

from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import examine_model
from compiled_llm.models.model_features import list_features
from tests.helpers.tiny_models import tiny_model
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as random_model

FEATURES = {
    "gpt2": [],
    "gemma2": ["windows", "all tokens", "softcap", "shared key heads"],
    "gpt_oss": ["windows", "all tokens", "sinks", "shared key heads", "experts"],
    "phi3": ["windows"],
}


@pytest.mark.parametrize("family", FEATURES)
def test_features_are_listed(family: str) -> None:
    model = tiny_model(family)
    with attention_routed(model):
        assert list_features(*examine_model(model)) == FEATURES[family]


def test_an_exported_model_with_alibi() -> None:
    model = random_model(tiny_config("bloom"))
    with attention_routed(model):
        assert list_features(*examine_model(model)) == ["ALiBi", "attention of its own"]
