"""The sweep's results: kept as data in tests/model_tests/model_sweep/models.yaml, shown as a table in docs/models.md."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.model_sweep.outcome import Outcome
from tests.model_sweep.tiny_configs import is_variant

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATA, TABLE = HERE / "models.yaml", ROOT / "docs" / "models.md"
_EXCUSES = HERE / "known_unsupported.yaml"
_HEAD = "# Written by `python -m tests.model_sweep --update`: what was found of each model type, compiled on a CPU. See docs/models.md.\n"


def read_excuses() -> dict[str, str]:
    """Types of which no tiny model can be checked, and why."""
    values: dict[str, str] = yaml.safe_load(_EXCUSES.read_text())
    return values


def read_data(path: Path = DATA) -> dict[str, dict[str, str]]:
    """For each type and variant its status, and its reason or what was exercised; nothing where there is no file."""
    values = yaml.safe_load(path.read_text()) if path.exists() else {}
    return {**values.get("models", {}), **values.get("variants", {})}


def to_data(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, str]]:
    """What is kept of outcomes: nothing that differs from machine to machine."""
    return {name: _kept(outcome) for name, outcome in sorted(outcomes.items())}


def _kept(outcome: Outcome) -> dict[str, str]:
    said = (
        {"exercised": outcome.exercised}
        if outcome.status == "works"
        else {"reason": outcome.reason}
    )
    return {"status": outcome.status, **said}


def write(data: Mapping[str, dict[str, str]], versions: Mapping[str, str]) -> None:
    """Replace the data and the table by these."""
    values: dict[str, Any] = {**versions}
    for group, of_variants in (("models", False), ("variants", True)):
        values[group] = {
            name: kept for name, kept in sorted(data.items()) if is_variant(name) == of_variants
        }
    DATA.write_text(_HEAD + yaml.safe_dump(values, sort_keys=False, width=200))
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(values))


def differences(outcomes: Mapping[str, Outcome], known: Mapping[str, dict[str, str]]) -> list[str]:
    """A line for each type that is not as the data says, or that fails."""
    lines = []
    for name, outcome in outcomes.items():
        before, now = known.get(name), _kept(outcome)
        if outcome.status == "fails":
            lines.append(f"{name}: fails: {outcome.reason}")
        elif before is None or (before["status"], before.get("reason")) != (
            now["status"],
            now.get("reason"),
        ):
            lines.append(
                f"{name}: {_words(now)}; tests/model_tests/model_sweep/models.yaml says: {_words(before) if before else 'nothing'}"
            )
    return lines


def totals(models: Mapping[str, Mapping[str, str]]) -> str:
    counts = Counter(kept["status"] for kept in models.values())
    return ", ".join(
        f"{counts[status]} {status}"
        for status in ("works", "unsupported", "fails")
        if counts[status]
    )


def table(values: Mapping[str, Any]) -> str:
    """The Markdown page for the data of tests/model_tests/model_sweep/models.yaml."""
    models, variants = values["models"], values["variants"]
    return "\n".join(
        [
            "# Models",
            "",
            f"The model types that transformers {values['transformers']} knows as causal LMs: {totals(models)}, of {len(models)}.",
            "",
            "For each, `make sweep` makes a tiny random model from its config class, of 2 to 4 layers with each kind of layer",
            "present, compiles it on the CPU in float32 with the default passes, and compares it with transformers' own eager",
            "generation: a prompt, the edge of a bucket, a prompt in chunks and a ragged batch, each with 12 decode steps.",
            "It works where all greedy tokens are equal and all logits within 1e-4, relative to the largest. What is unsupported",
            "is refused with this reason, most of it before any weight is read; of a few types no tiny model can be made",
            "(`tests/model_sweep/known_unsupported.yaml`), and a few would run, but eagerly.",
            "",
            *_rows("type", models),
            "",
            "## Variants",
            "",
            "Variants of some types, checked in the same way, each with a rope type other than its default. `longrope` and",
            "`dynamic` are served up to the length within which their frequencies do not change, and refused beyond it.",
            "",
            *_rows("variant", variants),
            "",
        ]
    )


def _rows(title: str, models: Mapping[str, Mapping[str, str]]) -> list[str]:
    rows = [
        f"| `{name}` | {kept['status']} | {kept.get('exercised') or kept.get('reason')} |"
        for name, kept in models.items()
    ]
    return [f"| {title} | | what was exercised, or why it is refused |", "|---|---|---|", *rows]


def _words(kept: Mapping[str, str]) -> str:
    return f"{kept['status']} ({kept['reason']})" if "reason" in kept else kept["status"]
