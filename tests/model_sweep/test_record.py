"""Recorded results of the sweep, and the page that shows them."""

import transformers
import yaml
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.model_sweep.record import (
    DATA,
    PAGE,
    ROOT,
    differences,
    models_page,
    read_known_unsupported,
    to_data,
    totals,
)
from tests.model_sweep.result import ModelResult
from tests.model_sweep.tiny_configs import variants

_RESULTS = {
    "a": ModelResult(status="works", difference=1e-6, exercised="2 calls"),
    "b": ModelResult(status="unsupported", reason="b: no"),
    "c": ModelResult(status="fails", reason="it broke"),
}
_DATA = to_data(_RESULTS)


def test_equal_results_do_not_differ() -> None:
    assert differences({name: _RESULTS[name] for name in "ab"}, _DATA) == []


def test_failures_and_changes_differ() -> None:
    assert differences(_RESULTS, _DATA) == ["c: fails: it broke"]
    changed = {"b": ModelResult(status="works")}
    assert differences(changed, _DATA) == ["b: works, recorded: unsupported (b: no)"]
    assert differences(changed, {}) == ["b: works, recorded: nothing"]


def test_page_has_totals_and_rows() -> None:
    assert totals(_DATA) == "1 works, 1 unsupported, 1 fails"
    page = models_page({"transformers": "5", "models": _DATA, "variants": {}})
    assert "Of the 3 causal LM types in transformers 5, 1 work and 2 do not." in page
    assert "| `a` | works | 2 calls |" in page
    assert "| `b` | unsupported | b: no |" in page


def test_recorded_data_is_complete() -> None:
    values = yaml.safe_load(DATA.read_text())
    models = values["models"]
    if values["transformers"] == transformers.__version__:
        assert set(models) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(values["variants"]) == set(variants())
    assert all(entry["status"] == "works" for entry in values["variants"].values())
    assert all(entry["status"] in ("works", "unsupported") for entry in models.values())
    assert all(entry["reason"] for entry in models.values() if entry["status"] == "unsupported")


def test_recorded_data_has_the_known_reasons() -> None:
    models = yaml.safe_load(DATA.read_text())["models"]
    for name, reason in read_known_unsupported().items():
        assert models[name] == {"status": "unsupported", "reason": reason}


def test_page_and_readme_show_the_recorded_data() -> None:
    """Regenerate the page with `tests.model_sweep.record.write_page` if this fails."""
    values = yaml.safe_load(DATA.read_text())
    assert PAGE.read_text() == models_page(values)
    models = values["models"]
    works = sum(entry["status"] == "works" for entry in models.values())
    assert f"{works} work and {len(models) - works} do not" in (ROOT / "README.md").read_text()
