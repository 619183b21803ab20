"""Systems and commands on a tiny model, in this process, without a compiler."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import buckets, passes, startup, stream, worker_group
from bench.decode import DecodeSettings
from bench.systems import System
from bench.systems.ours_stepped import OursStepped
from bench.systems.transformers_batching import TransformersBatching
from bench.systems.transformers_generate import TransformersEager
from bench.worker_group import WorkerGroup, make_setup
from bench.workloads import random_prompts
from compiled_llm.config.schema import Config
from tests.bench.local import LocalClient, fake_roofline, local_run, open_local, tiny_config
from tests.conftest import DEVICE

_ROOFLINE = fake_roofline()


def _started(system_class: Any, config: Config) -> Any:
    system: System = system_class(**asdict(make_setup(config, _ROOFLINE)))
    assert system.start() > 0
    return system


def _local_workers(config: Config) -> WorkerGroup:
    client: Any = LocalClient(_started(OursStepped, config))
    return WorkerGroup(clients={"ours": client})


@pytest.mark.parametrize("system_class", [OursStepped, TransformersEager, TransformersBatching])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_systems_generate_exactly_the_requested_lengths(
    tmp_path: Path, system_class: Any, temperature: float
) -> None:
    if system_class is TransformersBatching and DEVICE.type == "cuda":
        pytest.skip("transformers' batching plans for a visible GPU even with a model on the CPU")
    system = _started(system_class, tiny_config(tmp_path))
    try:
        prompts = [
            *random_prompts(4, 5, vocab_size=160, seed=1),
            *random_prompts(2, 11, vocab_size=160, seed=2),
        ]
        lengths = [3, 1, 7, 2, 5, 4]
        for _ in range(2):
            result = system.generate(prompts, lengths, temperature)
            assert result["counts"] == lengths
            assert result["seconds"] > 0
        assert system.describe()["version"]
    finally:
        system.close()


def test_our_engine_returns_the_counters_of_a_call(tmp_path: Path) -> None:
    system = _started(OursStepped, tiny_config(tmp_path))
    counters = system.generate([[5, 6, 7]], [4], 0.0)["counters"]
    assert counters["steps"] == counters["fallbacks"] == 4
    assert counters["host_seconds"] > 0
    assert system.report()["fallbacks"] == {"compile.dispatch is eager": 4}
    assert set(system.phases()) == {"import", "load", "prepare", "trace", "compile", "capture"}
    system.close()


def test_memory_shares_add_up(tmp_path: Path) -> None:
    setup = make_setup(tiny_config(tmp_path), _ROOFLINE, share=0.3, before=0.3)
    values = OursStepped(**asdict(setup))._config_values()
    assert values["cache"]["gpu_memory_utilization"] == pytest.approx(0.6)


def test_reserve_raises_a_limit_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = local_run(tiny_config(tmp_path))
    bench.reserve(200)
    assert bench.config.limits.max_model_len == bench.roofline.max_model_len == 200
    assert "limits.max_model_len is 128, raised to 200" in capsys.readouterr().err
    before = bench.config, bench.roofline
    bench.reserve(150)
    assert (bench.config, bench.roofline) == before


def test_buckets_times_every_batch_size(tmp_path: Path) -> None:
    workers = _local_workers(tiny_config(tmp_path))
    settings = DecodeSettings(context=20, steps=2, rounds=2)
    rows = buckets.measure(workers, _ROOFLINE, settings, max_batch=4)
    workers.close()
    assert [row["batch"] for row in rows] == [1, 2, 3, 4]
    assert {row["bucket"] for row in rows} == {"eager"}
    assert buckets.largest_jump(rows) in rows[1:]


def test_buckets_rejects_a_batch_above_the_limit(tmp_path: Path) -> None:
    settings = DecodeSettings(context=20, steps=2, rounds=2)
    with pytest.raises(ValueError, match=r"--largest 5: expected at most limits.max_num_seqs=4"):
        buckets.run(local_run(tiny_config(tmp_path)), settings, max_batch=5)


def test_stream_on_a_cpu_measures_host_time_only(tmp_path: Path) -> None:
    workers = _local_workers(tiny_config(tmp_path))
    settings = DecodeSettings(context=8, steps=3, rounds=2)
    (row,) = stream.measure(workers, ["ours"], _ROOFLINE, settings, batch=2)
    assert row["launches"] is None
    assert row["host_us"] > 0
    profiles = workers.call(
        "ours",
        "profile_workload",
        prompts=[[5] * 9] * 2,
        output_lengths=[80] * 2,
        temperature=0.0,
        steps=2,
    )
    assert profiles == {"prefill": [], "decode": []}
    workers.close()


def test_passes_are_left_out_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "open_worker", open_local)
    config = tiny_config(tmp_path)
    left_out = config.pass_order()[0]
    settings = DecodeSettings(context=8, steps=2, rounds=2)
    rows = passes.measure(local_run(config), settings, only=[left_out], batches=[1, 2])
    names = [passes.ALL, f"without {left_out}", passes.AGAIN]
    assert [(row["variant"], row["batch"]) for row in rows] == [
        (name, batch) for name in names for batch in (1, 2)
    ]
    assert "saved_us" in rows[2]
    assert "saved_us" not in rows[0]
    assert list(passes.variants(config, [])) == [
        passes.ALL,
        *(f"without {name}" for name in config.pass_order()),
        passes.AGAIN,
    ]
    with pytest.raises(ValueError, match=f"expected passes that the config has on: {left_out}"):
        passes.variants(config, ["nothing"])


def test_startup_is_split_into_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "open_worker", open_local)
    rows = startup.measure(local_run(tiny_config(tmp_path)), ["ours"], context=8, rounds=1)
    assert [row["caches"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert sum(row[phase] for phase in startup.PHASES) == pytest.approx(row["total"])
