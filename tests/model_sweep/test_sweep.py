"""Checks of a spread of model types, uncompiled; `make sweep` checks all of them compiled."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.conftest import DEVICE
from tests.model_sweep.check import MismatchError, check
from tests.model_sweep.tiny_configs import tiny_config, variants
from tests.model_sweep.tiny_model import tiny_model
from tests.model_sweep.worker import (
    _data_dependent_reason,
    check_in_subprocess,
    check_model_type,
)

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the sweep runs on a CPU")

# Model types with the features that they exercise; each has one that the others lack.
SPREAD = {
    "llama": "2 calls, shared key heads",
    "bert": "2 calls",
    "bart": "2 calls",
    "bloom": "2 calls, ALiBi, attention of its own",
    "deepseek_v3": "2 calls, keys and values of different dims, experts",
    "diffllama": "4 calls, shared key heads, several calls a layer",
    "gemma3n_text": "4 calls, windows, all tokens, shared key heads",
    "gemma4_text": "4 calls, windows, all tokens, shared key heads, heads that differ by layer",
    "gpt_oss": "2 calls, windows, all tokens, sinks, shared key heads, experts",
    "gpt_neo": "2 calls, windows, all tokens, attention of its own",
    "jamba": "2 calls, shared key heads, experts",
    "llama4_text": "4 calls, chunks, all tokens, shared key heads, experts",
    "mixtral": "2 calls, shared key heads, experts",
    "opt": "2 calls",
    "phimoe": "2 calls, windows, shared key heads, experts",
    "vaultgemma": "2 calls, windows, all tokens, softcap, shared key heads",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", SPREAD)
def test_spread_works(model_type: str) -> None:
    result = check_model_type(model_type, "eager")
    assert (result.status, result.reason) == ("works", "")
    assert result.exercised == SPREAD[model_type]


@pytest.mark.parametrize("name", variants())
def test_variants_work(name: str) -> None:
    result = check_model_type(name, "eager")
    assert (result.status, result.reason) == ("works", "")


def test_every_rope_type_has_a_variant() -> None:
    rope_types = {name.partition("+")[2] for name in variants() if name.startswith("llama+")}
    assert rope_types == set(ROPE_INIT_FUNCTIONS)


def test_a_wrong_window_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    from compiled_llm.runtime.step.step import Step

    original = Step.__init__

    def widened(self: Step, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        self.windows = tuple(window + 1 if window else 0 for window in self.windows)

    monkeypatch.setattr(Step, "__init__", widened)
    with pytest.raises(MismatchError, match="differ"):
        check(tiny_model(tiny_config("phimoe")), "eager")


def test_wrong_positions_are_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    from compiled_llm.models.model_call import ModelCall

    original = ModelCall.__call__
    monkeypatch.setattr(
        ModelCall,
        "__call__",
        lambda self, ids, positions, *rest: original(self, ids, positions // 2, *rest),
    )
    with pytest.raises(MismatchError, match="differ"):
        check(tiny_model(tiny_config("bart")), "eager")


def test_an_insensitive_model_is_a_mismatch() -> None:
    model = tiny_model(tiny_config("llama"))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(MismatchError, match="the tiny model is insensitive"):
        check(model, "eager")


def test_a_process_that_exceeds_its_timeout_fails(tmp_path: Path) -> None:
    result = check_in_subprocess("llama", "eager", timeout=0.01, log=tmp_path / "log")
    assert result.status == "fails"
    assert "took more than" in result.reason


def test_known_unsupported_types_are_not_checked() -> None:
    result = check_model_type("blt", "eager")
    assert result.status == "unsupported"
    assert result.reason.startswith("blt: ")


def test_only_data_dependent_control_flow_is_unsupported() -> None:
    error = "bucket prefill-24-full could not be compiled: {}"
    guard = (
        "UserError: Consider this. Could not guard on data-dependent expression Eq(u4, u2) "
        "(unhinted: Eq(u4, u2))."
    )
    for text in (guard, "Unsupported: Data-dependent branching"):
        reason = _data_dependent_reason("dbrx", error.format(text))
        assert str(reason).startswith("dbrx: its forward has data-dependent control flow")
    for text in ("InductorError: LoweringException: no", "Unsupported: an unknown call"):
        assert _data_dependent_reason("llama", error.format(text)) is None
