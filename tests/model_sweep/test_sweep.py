"""A spread of families, uncompiled, as `make sweep` checks all of them compiled; and what the sweep makes of what it finds."""

from collections.abc import Iterator

import pytest
import torch
import transformers
import yaml
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conftest import DEVICE
from tests.model_sweep.check import MismatchError, check
from tests.model_sweep.outcome import Outcome
from tests.model_sweep.record import DATA, ROOT, TABLE, differences, table, to_data
from tests.model_sweep.tiny_configs import tiny_config, variants
from tests.model_sweep.tiny_model import tiny_model
from tests.model_sweep.worker import _untraceable, outcome_of, run_apart

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the sweep is of a CPU")

# Each for something that the others lack.
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
def test_the_spread_works(model_type: str) -> None:
    outcome = outcome_of(model_type, "eager")
    assert (outcome.status, outcome.reason) == ("works", "")
    assert outcome.exercised == SPREAD[model_type]


@pytest.mark.parametrize("name", variants())
def test_variants_work(name: str) -> None:
    outcome = outcome_of(name, "eager")
    assert (outcome.status, outcome.reason) == ("works", "")


def test_every_rope_type_has_a_variant() -> None:
    assert {name.partition("+")[2] for name in variants() if name.startswith("llama+")} == set(
        ROPE_INIT_FUNCTIONS
    )


def test_a_wrong_window_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep can fail: an engine that sees one token more or less is found out."""
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
        lambda self, ids, positions, *wanted: original(self, ids, positions // 2, *wanted),
    )
    with pytest.raises(MismatchError, match="differ"):
        check(tiny_model(tiny_config("bart")), "eager")


def test_a_model_that_tells_nothing_is_not_taken_for_one_that_works() -> None:
    model = tiny_model(tiny_config("llama"))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(MismatchError, match="tells nothing"):
        check(model, "eager")


def test_a_process_that_hangs_is_a_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    outcome = run_apart("llama", "eager", timeout=0.01, log=tmp_path / "log")
    assert outcome.status == "fails"
    assert "took more than" in outcome.reason


def test_results_are_kept_and_compared() -> None:
    outcomes = {
        "a": Outcome(status="works", difference=1e-6, exercised="2 calls"),
        "b": Outcome(status="unsupported", reason="b: no"),
        "c": Outcome(status="fails", reason="it broke"),
    }
    data = to_data(outcomes)
    assert differences({name: outcomes[name] for name in "ab"}, data) == []
    assert differences(outcomes, data) == ["c: fails: it broke"]
    assert "b" in differences({"b": Outcome(status="works")}, data)[0]
    page = table({"transformers": "5", "models": data, "variants": {}})
    assert "1 works, 1 unsupported, 1 fails, of 3" in page
    assert "| `b` | unsupported | b: no |" in page


def test_a_forward_that_is_no_graph_is_unsupported_and_a_broken_compiler_is_not() -> None:
    error = "bucket prefill-24-full could not be compiled: {}"
    guards = error.format(
        "UserError: Consider this. Could not guard on data-dependent expression Eq(u4, u2) (unhinted: Eq(u4, u2))."
    )
    for said in (guards, error.format("Unsupported: Data-dependent branching")):
        assert str(_untraceable("dbrx", said)).startswith("dbrx: its forward branches on values")
    assert _untraceable("llama", error.format("InductorError: LoweringException: no")) is None
    assert (
        _untraceable("llama", error.format("Unsupported: a call that torch does not know")) is None
    )


def test_the_record_is_whole_and_its_table_says_the_same() -> None:
    values = yaml.safe_load(DATA.read_text())
    models = values["models"]
    if values["transformers"] == transformers.__version__:
        assert set(models) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(values["variants"]) == set(variants())
    assert all(kept["status"] == "works" for kept in values["variants"].values())
    assert all(kept["status"] in ("works", "unsupported") for kept in models.values())
    assert all(kept["reason"] for kept in models.values() if kept["status"] == "unsupported")
    assert TABLE.read_text() == table(values)
    count = sum(kept["status"] == "works" for kept in models.values())
    assert f"{count} work and {len(models) - count} do not" in (ROOT / "README.md").read_text()
