"""Each second of a start-up is counted once."""

import pytest
from torch._dynamo.utils import compilation_time_metrics

from compiled_llm import CompiledLLM
from compiled_llm.report.report import BucketReport, PhaseReport
from compiled_llm.runtime.compilation.timing import Timestamp, durations, split_phase
from tests.helpers.tiny_models import small_config, tiny_model


def test_autotuning_is_subtracted_where_it_happened() -> None:
    spent = durations(Timestamp(10, 1, 2), Timestamp(20, 4, 3), Timestamp(25, 4, 7))
    assert spent == {
        "trace_seconds": 3,
        "compile_seconds": 6,
        "autotune_seconds": 5,
        "capture_seconds": 1,
    }
    assert sum(spent.values()) == 25 - 10  # type: ignore[arg-type]


def test_autotuning_is_read_from_torchs_times(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Timestamp.now()
    counted = {
        "CachingAutotuner.benchmark_all_configs": [1.0, 2.0],
        "mm_template_autotuning": [4.0],
        "GraphLowering.run": [8.0],
    }
    for name, seconds in counted.items():
        monkeypatch.setitem(
            compilation_time_metrics, name, [*compilation_time_metrics.get(name, []), *seconds]
        )
    assert Timestamp.now().autotune - before.autotune == pytest.approx(7.0)
    assert Timestamp.now().trace == before.trace


def test_a_phase_in_parts() -> None:
    made = BucketReport(
        bucket="a",
        size=1,
        trace_seconds=1,
        compile_seconds=2,
        autotune_seconds=3,
        capture_seconds=4,
    )
    loaded = BucketReport(bucket="b", size=1, loaded=True, compile_seconds=5, capture_seconds=6)
    parts = split_phase(
        PhaseReport(name="compile and capture", seconds=30, bytes=7), [made, loaded]
    )
    assert {part.name: (part.seconds, part.bytes) for part in parts} == {
        "trace": (1, 0),
        "compile": (2, 0),
        "load compiled": (5, 0),
        "autotune": (3, 0),
        "capture": (10, 7),
        "other": (9, 0),
    }


def test_the_phases_of_a_start() -> None:
    config = small_config(buckets={"decode": [], "prefill": [48]}, verify=True)
    with CompiledLLM(tiny_model("llama"), None, config, progress=False) as llm:
        phases = {phase.name: phase.seconds for phase in llm.report().phases}
    assert list(phases) == [
        "import", "examine model", "measure activations", "allocate KV cache",
        "trace", "compile", "load compiled", "autotune", "capture", "other", "verify",
    ]  # fmt: skip
    assert (
        min(
            phases["import"],
            phases["trace"],
            phases["compile"],
            phases["capture"],
            phases["verify"],
        )
        > 0
    )
    assert phases["load compiled"] == 0
