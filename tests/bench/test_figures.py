"""Plain arithmetic of the suite: rounds, ratios, profiles, workloads, files."""

import json
from pathlib import Path

import pytest

from bench.figures import bars, lines, save_figure, timelines
from bench.latency import Plan
from bench.record import make_record, model_name, save
from bench.sharegpt import read_lengths
from bench.stats import figure, ratio
from bench.trace import busy_us, idle_between_launches, launches
from bench.workloads import fresh_prompts, offline
from compiled_llm.config.loader import parse_config
from tests.bench.local import made_up_card


def test_medians_and_spreads() -> None:
    found = figure([3.0, 1.0, 2.0])
    assert (found.median, found.low, found.high, found.spread) == (2.0, 1.0, 3.0, 1.0)


def test_a_ratio_compares_rounds_that_ran_side_by_side() -> None:
    assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert ratio([], [1.0]) is None


def test_busy_and_idle_time_of_spans() -> None:
    spans = [(0.0, 4.0, 1), (2.0, 5.0, 1), (6.0, 8.0, 1), (10.0, 12.0, 2)]
    assert busy_us(spans) == 9.0
    assert idle_between_launches(spans) == pytest.approx(2 / 12), (
        "a gap within a launch is not one between two"
    )
    assert idle_between_launches([]) is None


def test_launches_are_counted_by_kind() -> None:
    assert launches(["cudaGraphLaunch", "cudaMemcpyAsync", "aten::mm", "cudaMemcpyAsync"]) == {
        "cudaGraphLaunch": 1,
        "cudaMemcpy": 2,
    }


def test_the_offline_workload_is_that_of_the_peers() -> None:
    workload = offline()
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (142827, 133966)
    assert max(max(prompt) for prompt in offline(4, vocab_size=50).prompts) < 50


def test_prompts_are_new_for_each_seed() -> None:
    prompts = [fresh_prompts(2, 30, vocab_size=160, seed=seed) for seed in (1, 2)]
    assert prompts[0] != prompts[1]
    assert prompts[0] == fresh_prompts(2, 30, vocab_size=160, seed=1)


def test_the_lead_outlasts_the_prompts() -> None:
    plan = Plan(batches=[1, 8], context=16384, steps=50, rounds=5)
    assert plan.lead(8, 2048) == 4 + 64
    assert plan.longest(2048) == 16384 + 68 + 50


def test_conversations_become_lengths(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "one two three"},
        {"from": "gpt", "value": "four five"},
        {"from": "human", "value": "six"},
    ]
    entries = [
        {"conversations": turns},
        {"conversations": turns[:1]},
        {
            "conversations": [
                {"from": "user", "value": "a"},
                {"from": "assistant", "value": "b " * 50},
            ]
        },
        {"conversations": turns},
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(entries))
    count = lambda text: len(text.split())  # noqa: E731
    assert read_lengths(path, count, limit=10, longest=20) == [(3, 2), (3, 2)]
    assert read_lengths(path, count, limit=2, longest=100) == [(3, 2), (1, 50)]
    with pytest.raises(
        ValueError, match="no conversation with a question and an answer of at most 2 tokens"
    ):
        read_lengths(path, count, limit=10, longest=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must hold a list"),
        ("[", "is not JSON"),
        ('[{"text": 1}]', 'entry 0 is not an object with a list of "conversations"'),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lengths(path, len, limit=1, longest=10)


def test_results_are_dated_files_that_overwrite_nothing(tmp_path: Path) -> None:
    config = parse_config({"model": {"name": "Qwen/Qwen3-0.6B"}})
    record = make_record("latency", config, made_up_card(), {"rounds": 1}, {"rows": []})
    paths = [save(record, tmp_path / "results", model_name(config)) for _ in range(2)]
    assert [path.name for path in paths] == [
        f"{record['date'][:10]}-latency-qwen3-0.6b{n}.json" for n in ("", "-2")
    ]
    kept = json.loads(paths[1].read_text())
    assert kept["card"]["ceiling_tokens_per_second"] == 250
    assert {"torch", "triton", "transformers", "driver", "commit", "python"} <= kept[
        "versions"
    ].keys()
    assert kept["config"]["model"]["name"] == "Qwen/Qwen3-0.6B"


def test_plots_are_png_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"x": 1, "y": 2.0, "s": "a"},
        {"x": 2, "y": None, "s": "b"},
        {"x": 4, "y": 3.0, "s": "a"},
    ]
    strips = [
        {"system": "a", "timeline": [(0.0, 1.0), (2.0, 3.0)]},
        {"system": "b", "timeline": []},
    ]
    draws = [
        lines(rows, x="x", y="y", by="s", labels=("x", "y")),
        bars(rows, x="s", ys=["y", "x"], label="y"),
        timelines(strips),
    ]
    path = save_figure(tmp_path / "plot.png", "a title", *draws)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
