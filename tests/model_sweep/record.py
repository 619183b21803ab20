"""Recorded results of the sweep: tests/model_sweep/models.yaml, shown by docs/models.md."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.model_sweep.result import ModelResult
from tests.model_sweep.tiny_configs import is_variant

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATA = HERE / "models.yaml"
PAGE = ROOT / "docs" / "models.md"
_KNOWN_UNSUPPORTED = HERE / "known_unsupported.yaml"
_WIDTH = 85  # columns after which a line of the data is folded at the next space
_HEADER = (
    "# Written by `python -m tests.model_sweep --update`: the result of each model type, compiled\n"
    "# on a CPU. docs/models.md shows the same.\n"
)
_PAGE = """\
# Models

Of the {count} causal LM types in transformers {transformers}, {works} work and {others} do not.

`make sweep` checks each type on the CPU in float32. It builds a tiny random model from the config
class, with 2 to 4 layers that cover all kinds of layers, compiles it with the default passes, and
compares it with transformers' eager generation. The prompts are a short one, one as long as the
bucket, one just longer, one in several chunks, and a ragged batch; each is followed by 12 decode
steps. A type works if all greedy tokens are equal and all logits agree within 1e-4, relative to the
largest. Unsupported types are refused with the reason given, most of them before any weight is
read. For some of them no tiny model can be checked (`tests/model_sweep/known_unsupported.yaml`),
and some run eagerly, but cannot be compiled.

{models}

## Variants

Variants of some types, checked in the same way, each with a rope type other than its default.
`longrope` and `dynamic` are served up to the length at which their frequencies change.

{variants}
"""


def read_known_unsupported() -> dict[str, str]:
    """Return the reasons for the types of which no tiny model can be checked."""
    values: dict[str, str] = yaml.safe_load(_KNOWN_UNSUPPORTED.read_text())
    return values


def read_data(path: Path = DATA) -> dict[str, dict[str, str]]:
    """Return the entry of each type and variant; empty without a file."""
    values = yaml.safe_load(path.read_text()) if path.exists() else {}
    return {**values.get("models", {}), **values.get("variants", {})}


def to_data(results: Mapping[str, ModelResult]) -> dict[str, dict[str, str]]:
    """Return the entries of results, without values that depend on the machine."""
    return {name: _entry(result) for name, result in sorted(results.items())}


def _entry(result: ModelResult) -> dict[str, str]:
    if result.status == "works":
        return {"status": result.status, "exercised": result.exercised}
    return {"status": result.status, "reason": result.reason}


def write_record(data: Mapping[str, dict[str, str]], versions: Mapping[str, str]) -> None:
    """Replace the data by these entries, and the page."""
    values: dict[str, Any] = {**versions}
    for group, of_variants in (("models", False), ("variants", True)):
        entries = sorted(data.items())
        values[group] = {name: each for name, each in entries if is_variant(name) == of_variants}
    DATA.write_text(_HEADER + yaml.safe_dump(values, sort_keys=False, width=_WIDTH))
    write_page()


def write_page() -> None:
    """Replace the page by that of the recorded data."""
    PAGE.write_text(models_page(yaml.safe_load(DATA.read_text())))


def differences(
    results: Mapping[str, ModelResult], recorded: Mapping[str, dict[str, str]]
) -> list[str]:
    """Return a line for each type that fails or differs from its recorded entry."""
    lines = []
    for name, result in results.items():
        before, now = recorded.get(name), _entry(result)
        if result.status == "fails":
            lines.append(f"{name}: fails: {result.reason}")
        elif before is None or not _same(before, now):
            expected = _describe(before) if before else "nothing"
            lines.append(f"{name}: {_describe(now)}, recorded: {expected}")
    return lines


def totals(models: Mapping[str, Mapping[str, str]]) -> str:
    """Return the number of types of each status, in words."""
    counts = Counter(entry["status"] for entry in models.values())
    statuses = ("works", "unsupported", "fails")
    return ", ".join(f"{counts[status]} {status}" for status in statuses if counts[status])


def models_page(values: Mapping[str, Any]) -> str:
    """Return the Markdown page for the values of models.yaml."""
    models = values["models"]
    works = sum(entry["status"] == "works" for entry in models.values())
    return _PAGE.format(
        count=len(models),
        transformers=values["transformers"],
        works=works,
        others=len(models) - works,
        models=_table("type", models),
        variants=_table("variant", values["variants"]),
    )


def _table(title: str, models: Mapping[str, Mapping[str, str]]) -> str:
    head = [f"| {title} | status | features exercised, or reason |", "|---|---|---|"]
    rows = [
        f"| `{name}` | {entry['status']} | {entry.get('exercised') or entry.get('reason')} |"
        for name, entry in models.items()
    ]
    return "\n".join([*head, *rows])


def _same(before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    return all(before.get(key) == now.get(key) for key in ("status", "reason"))


def _describe(entry: Mapping[str, str]) -> str:
    return f"{entry['status']} ({entry['reason']})" if "reason" in entry else entry["status"]
