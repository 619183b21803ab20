"""Tests of rope types whose frequencies depend on the largest position of a call."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from compiled_llm import CompiledLLM
from compiled_llm.cli.inspect import inspect_model
from compiled_llm.config.loader import parse_config
from compiled_llm.config.schema import LimitsConfig
from compiled_llm.errors import UnsupportedModelError
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.rotary import RotaryLimit, fixed_frequencies, rotary_limit
from compiled_llm.models.token_independence import check_token_independence
from compiled_llm.runtime.limits import Limits
from tests.conftest import DEVICE
from tests.helpers.tiny_models import (
    Reference,
    check_matches,
    greedy,
    prompt_of,
    small_config,
    tiny_model,
)
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as random_model

FACTORS = {
    "short_factor": [1.0 + number / 10 for number in range(8)],
    "long_factor": [4.0 + number for number in range(8)],
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    **FACTORS,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
CPU = torch.device("cpu")


def _llama(parameters: dict[str, Any]) -> PreTrainedModel:
    return tiny_model("llama", rope_parameters=dict(parameters))


def _rotary(model: PreTrainedModel) -> Any:
    return next(module for module in model.modules() if hasattr(module, "rope_type"))


def _config(dispatch: str = "eager", **limits: Any):  # type: ignore[no-untyped-def]
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 48, **limits}
    return small_config(
        limits=sizes, buckets={"decode": [], "prefill": [48]}, compile={"dispatch": dispatch}
    )


@pytest.mark.parametrize("dispatch", ["eager", "direct"])
def test_short_and_long_requests_keep_their_frequencies(dispatch: str) -> None:
    model = _llama(LONGROPE)
    reference, prompts = Reference(model), [prompt_of(5), prompt_of(54, 1), prompt_of(20, 2)]
    with CompiledLLM(model, None, _config(dispatch, max_model_len=64), progress=False) as llm:
        assert greedy(llm, prompts, 10) == [reference(prompt, 10) for prompt in prompts]
        report = llm.report()
    if dispatch == "direct":
        assert {bucket.state for bucket in report.buckets} == {
            "graph" if DEVICE.type == "cuda" else "compiled"
        }
        assert not report.fallbacks
        check_matches(report)


@pytest.mark.parametrize(
    ("parameters", "length"), [(LONGROPE, 64), (DYNAMIC, 256)], ids=["longrope", "dynamic"]
)
def test_a_length_beyond_the_limit_is_refused_by_name(
    parameters: dict[str, Any], length: int
) -> None:
    rope_type = parameters["rope_type"]
    message = (
        f"max_model_len={length + 1}, but beyond {length} tokens, rope_type '{rope_type}' .* "
        f"lower it to {length}, or"
    )
    with pytest.raises(ValueError, match=message):
        CompiledLLM(_llama(parameters), None, _config(max_model_len=length + 1), progress=False)


def test_auto_is_the_original_length_with_a_warning() -> None:
    model = _llama(LONGROPE)
    with CompiledLLM(model, None, _config(max_model_len="auto"), progress=False) as llm:
        assert llm.model_runner.limits.max_model_len == 64
        (warning,) = llm.report().warnings
    assert warning.startswith(
        "limits.max_model_len is 64 instead of 256: beyond 64 tokens, rope_type 'longrope'"
    )
    assert Limits.resolve(LimitsConfig(), _llama(DYNAMIC).config, CPU).warning is None, (
        "256 is what auto is anyway"
    )


def test_the_lowest_limit_of_all_layer_types_counts() -> None:
    assert rotary_limit(tiny_config("llama")) is None
    assert rotary_limit(tiny_config("gemma3_text")) is None
    assert rotary_limit(tiny_config("gemma3_text+dynamic+longrope")) == RotaryLimit(
        rope_type="longrope", length=128
    )
    assert rotary_limit(tiny_config("phimoe+longrope")) == RotaryLimit(
        rope_type="longrope", length=128
    )
    assert rotary_limit(tiny_config("falcon+dynamic")) == RotaryLimit(
        rope_type="dynamic", length=256
    )


def test_an_inspection_has_the_same_warning(tmp_path: Path) -> None:
    _llama(LONGROPE).config.save_pretrained(tmp_path)
    settings = {
        "name": str(tmp_path / "config.json"),
        "weights": "random",
        "device": "cuda",
        "dtype": "bfloat16",
    }
    inspection = inspect_model(parse_config({"model": settings}))
    assert inspection.limits.max_model_len == 64
    assert inspection.expected["rotary_outer_product"] == 1
    assert "warning:   limits.max_model_len is 64 instead of 256" in str(inspection)
    with pytest.raises(ValueError, match="rope_type 'longrope'"):
        inspect_model(parse_config({"model": settings, "limits": {"max_model_len": 65}}))


def test_frequencies_changed_by_a_long_sequence_are_fixed_and_restored() -> None:
    model = _llama(DYNAMIC)
    reference, prompt = Reference(model), prompt_of(12)
    with torch.no_grad():
        model(torch.arange(300, device=DEVICE)[None] % 100)
    rotary = _rotary(model)
    grown = rotary.inv_freq.clone()
    assert not torch.equal(grown, rotary.original_inv_freq)
    with CompiledLLM(model, None, _config(max_model_len=256), progress=False) as llm:
        assert greedy(llm, [prompt], 10) == [reference(prompt, 10)]
    assert rotary.rope_type == "dynamic"
    assert torch.equal(rotary.inv_freq, grown)


@pytest.mark.parametrize(
    "name", ["llama+longrope", "gemma3_text+dynamic+longrope", "phimoe+longrope"]
)
def test_the_last_user_of_a_model_restores_it(name: str) -> None:
    model = random_model(tiny_config(name))
    before = [_attributes(module) for module in model.modules()]
    first, second = fixed_frequencies(model), fixed_frequencies(model)
    first.__enter__()
    fixed = [_attributes(module) for module in model.modules()]
    assert fixed != before
    second.__enter__()
    first.__exit__(None, None, None)
    assert [_attributes(module) for module in model.modules()] == fixed
    second.__exit__(None, None, None)
    assert [_attributes(module) for module in model.modules()] == before


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what `fixed_frequencies` may change, with tensors by their identity."""
    names = [name for name in vars(module) if name in ("rope_type", "rope_init_fn", "config")]
    found = {name: copy.deepcopy(getattr(module, name)) for name in names}
    return {
        **found,
        "children": list(module._modules),
        **{name: id(buffer) for name, buffer in module._buffers.items()},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("llama+longrope", 128),
        ("phimoe+longrope", 128),
        ("llama+dynamic", 256),
        ("falcon_h1+dynamic", 256),
    ],
)
def test_dependence_on_the_largest_position_is_found_in_any_model(
    name: str, length: int, dtype: torch.dtype
) -> None:
    """Frequencies are not fixed here, as in a model whose own code selects them."""
    model = random_model(tiny_config(name)).to(DEVICE, dtype)
    with attention_routed(model):
        check_token_independence(model, length)
        for too_long in (length * 5 // 4, length * 10):
            with pytest.raises(UnsupportedModelError) as raised:
                check_token_independence(model, too_long)
            message, largest = str(raised.value).rsplit(" ", 1)
            reason = "a token's logits depend on the largest position"
            assert f"with positions up to {too_long - 1}, {reason}" in message
            assert message.endswith(f"lower limits.max_model_len={too_long} to at most")
            assert int(largest) == length or (
                dtype == torch.bfloat16 and length < int(largest) < 1.1 * length
            )


def test_missing_positions_are_named() -> None:
    model = random_model(tiny_config("whisper"))
    assert Limits.resolve(LimitsConfig(), model.config, CPU).max_model_len == 256
    if DEVICE.type == "cpu":  # on a GPU, an index out of range makes the device unusable
        message = (
            "forward fails \\(index 999 is out .* lower limits.max_model_len=2000 to at most 256"
        )
        with pytest.raises(UnsupportedModelError, match=message), attention_routed(model):
            check_token_independence(model, 2000)
