"""The systems and the commands on a tiny model, in this process, without a compiler."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import buckets, passes, startup, stream, worker_group
from bench.systems import System
from bench.systems.ours_steps import Steps
from bench.systems.transformers_batching import TransformersBatching
from bench.systems.transformers_generate import TransformersEager
from bench.worker_group import Options, WorkerGroup, fitted, setup_of
from bench.workloads import fresh_prompts
from compiled_llm.config.schema import Config
from tests.bench.local import Local, made_up_card, open_local, tiny_config
from tests.conftest import DEVICE

_CARD = made_up_card()


def _started(kind: Any, config: Config) -> Any:
    system: System = kind(**asdict(setup_of(config, _CARD)))
    assert system.start() > 0
    return system


@pytest.mark.parametrize("kind", [Steps, TransformersEager, TransformersBatching])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_a_system_gives_exactly_the_tokens_asked_for(
    tmp_path: Path, kind: Any, temperature: float
) -> None:
    if kind is TransformersBatching and DEVICE.type == "cuda":
        pytest.skip(
            "its continuous batching plans for the GPU that it sees, though the model is on the CPU"
        )
    system = _started(kind, tiny_config(tmp_path))
    try:
        prompts = [
            *fresh_prompts(4, 5, vocab_size=160, seed=1),
            *fresh_prompts(2, 11, vocab_size=160, seed=2),
        ]
        lengths = [3, 1, 7, 2, 5, 4]
        for _ in range(2):
            generated = system.generate(prompts, lengths, temperature)
            assert generated["counts"] == lengths
            assert generated["seconds"] > 0
        assert system.describe()["version"]
    finally:
        system.close()


def test_our_engine_counts_what_a_call_took(tmp_path: Path) -> None:
    system = _started(Steps, tiny_config(tmp_path))
    counters = system.generate([[5, 6, 7]], [4], 0.0)["counters"]
    assert counters["steps"] == counters["fallbacks"] == 4
    assert counters["host_seconds"] > 0
    assert system.report()["fallbacks"] == {"compile.dispatch is eager": 4}
    assert set(system.phases()) == {"import", "load", "prepare", "trace", "compile", "capture"}
    system.close()


def test_shares_of_memory_add_up(tmp_path: Path) -> None:
    setup = setup_of(tiny_config(tmp_path), _CARD, share=0.3, before=0.3)
    assert Steps(**asdict(setup))._values()["cache"]["gpu_memory_utilization"] == pytest.approx(0.6)


def test_a_limit_is_raised_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, card = fitted(tiny_config(tmp_path), _CARD, 200)
    assert config.limits.max_model_len == card.max_model_len == 200
    assert "limits.max_model_len is 128, raised to 200" in capsys.readouterr().err
    assert fitted(config, card, 150) == (config, card)


def test_every_batch_size_is_timed(tmp_path: Path) -> None:
    local = WorkerGroup(workers={"ours": Local(_started(Steps, tiny_config(tmp_path)))})  # type: ignore[dict-item]
    rows = buckets.run(local, _CARD, context=20, steps=2, rounds=2, largest=4)
    local.close()
    assert [row["batch"] for row in rows] == [1, 2, 3, 4]
    assert {row["bucket"] for row in rows} == {"eager"}
    assert buckets.worst(rows) in rows[1:]


def test_on_a_cpu_the_stream_has_host_time_alone(tmp_path: Path) -> None:
    local = WorkerGroup(workers={"ours": Local(_started(Steps, tiny_config(tmp_path)))})  # type: ignore[dict-item]
    (row,) = stream.run(local, ["ours"], _CARD, batch=2, context=8, steps=3, rounds=2)
    assert row["launches"] is None
    assert row["host_us"] > 0
    found = local.call(
        "ours",
        "profile_workload",
        prompts=[[5] * 9] * 2,
        output_lengths=[80] * 2,
        temperature=0.0,
        steps=2,
    )
    assert found == {"prefill": [], "decode": []}
    local.close()


def test_each_pass_is_left_out_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "open_worker", open_local)
    config = tiny_config(tmp_path)
    sizes: dict[str, Any] = {"batches": [1, 2], "context": 8, "steps": 2, "rounds": 2}
    rows = passes.run(config, _CARD, Options(), only=["lower_attention_marker"], **sizes)
    names = [passes.ALL, "without lower_attention_marker", passes.AGAIN]
    assert [(row["variant"], row["batch"]) for row in rows] == [
        (name, batch) for name in names for batch in (1, 2)
    ]
    assert "earned_us" in rows[2]
    assert "earned_us" not in rows[0]
    assert list(passes.variants(config, [])) == [
        passes.ALL,
        *(f"without {name}" for name in config.pass_order()),
        passes.AGAIN,
    ]
    with pytest.raises(
        ValueError, match="expected passes that the config has on: lower_attention_marker"
    ):
        passes.variants(config, ["nothing"])


def test_a_start_is_split_into_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "open_worker", open_local)
    rows = startup.run(["ours"], tiny_config(tmp_path), _CARD, Options(), context=8, rounds=1)
    assert [row["caches"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert sum(row[phase] for phase in startup.PHASES) == pytest.approx(row["total"])
