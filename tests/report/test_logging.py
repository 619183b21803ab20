"""What a report logs: phases when they end, warnings, and each reason of a fallback once."""

import logging

import pytest
import torch

from compiled_llm.report.report import Report, StepCounters

CPU = torch.device("cpu")


def _lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_phase_is_logged_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compiled_llm")
    report = Report()
    with report.phase("load weights", CPU):
        assert _lines(caplog) == []
    (line,) = _lines(caplog)
    assert line == ("INFO", f"load weights: {report.phases[0].seconds:.2f} s")
    with pytest.raises(KeyError), report.phase("verify", CPU):
        raise KeyError
    assert len(report.phases) == len(caplog.records) == 1, "a phase that failed has no duration"


def test_a_warning_is_in_the_report_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compiled_llm")
    report = Report()
    report.warn("100% of the memory")
    assert report.warnings == ["100% of the memory"]
    assert _lines(caplog) == [("WARNING", "100% of the memory")]


def test_each_reason_of_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compiled_llm")
    counters = StepCounters()
    for reason in ("no bucket", "no bucket", "failed", "no bucket"):
        counters.count_fallback(reason, expected=False)
    counters.count_fallback("compile.dispatch is eager", expected=True)
    assert counters.fallbacks == {"no bucket": 3, "failed": 1, "compile.dispatch is eager": 1}
    assert _lines(caplog) == [
        ("WARNING", "a step runs eagerly: no bucket"),
        ("WARNING", "a step runs eagerly: failed"),
        ("INFO", "a step runs eagerly: compile.dispatch is eager"),
    ]


def test_each_reason_of_another_bucket_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compiled_llm")
    counters = StepCounters()
    for _ in range(2):
        counters.count_stand_in("decode-2-greedy failed; decode-4-greedy served")
    assert counters.stand_ins.total() == 2
    assert [level for level, _ in _lines(caplog)] == ["INFO"]


def test_plain_data_is_flat() -> None:
    report = Report()
    report.startup.facts["model"] = "tiny"
    report.counters.fallbacks["no bucket"] += 2
    values = report.to_dict()
    assert values.keys() == {
        *("facts", "phases", "artifact_refusal", "buckets", "scheduling", "warnings"),
        *("graphs", "pool_bytes", "fallbacks", "stand_ins", "graph_events"),
    }
    assert (values["facts"], values["fallbacks"]) == ({"model": "tiny"}, {"no bucket": 2})
