"""CUDA graphs keep to their budget, the most useful first; the KV cache takes what is left."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from compiled_llm import CompiledLLM
from compiled_llm.config.loader import parse_config
from compiled_llm.config.schema import CacheConfig, Sampler
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.runtime.bucket_tuning import Traffic
from compiled_llm.runtime.buckets import Bucket, make_buckets
from compiled_llm.runtime.capture import warmup
from compiled_llm.runtime.capture.graph_budget import order_by_usefulness
from compiled_llm.runtime.compilation import cuda_graph_trees
from compiled_llm.runtime.compilation.compiler import CompiledStep
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory import kv_cache
from compiled_llm.runtime.memory.allocation import reserved_for_graphs
from compiled_llm.runtime.step.step import Step
from passes.attention_reach import AttentionReach
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

MIB = 2**20


def _decode(*sizes: int, samplers: tuple[Sampler, ...] = ("greedy",)) -> list[Bucket]:
    return make_buckets("decode", list(sizes), samplers, limit=max(sizes), growth=2)


@settings(deadline=None)
@given(
    st.sets(st.integers(1, 32), min_size=1, max_size=6),
    st.dictionaries(st.integers(1, 32), st.integers(1, 50), max_size=5),
)
def test_each_next_bucket_saves_the_most_padding(sizes: set[int], seen: dict[int, int]) -> None:
    largest = max(sizes)
    traffic = Traffic(
        limit=largest,
        buckets=[],
        seen=Counter({size: n for size, n in seen.items() if size <= largest}),
    )
    order = [
        bucket.size
        for bucket in order_by_usefulness(
            _decode(*sizes), {"decode": traffic} if traffic.seen else {}
        )
    ]
    assert sorted(order) == sorted(sizes)
    assert order[0] == largest
    if not traffic.seen:
        traffic = Traffic(limit=largest, buckets=[], seen=Counter(range(1, largest + 1)))
    for number in range(1, len(order)):
        least = min(traffic.waste([*order[:number], other]) for other in order[number:])
        assert traffic.waste(order[: number + 1]) == pytest.approx(least)


def test_buckets_that_hold_all_batches_come_first() -> None:
    prefill = make_buckets("prefill", [16], ["greedy", "full"], limit=64, growth=2)
    order = order_by_usefulness([*prefill, *_decode(1, 4, samplers=("greedy", "full"))], {})
    assert order[:2] == [Bucket("prefill", 64, "full"), Bucket("decode", 4, "full")]
    assert len(set(order)) == len(order) == 8


class _Device:
    """Memory of graphs: a pool as large as the largest one needs, and some for each graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, a_token: int, a_graph: int) -> None:
        self.live: list[int] = []
        self.pool = self.most = 0
        self._a_token, self._a_graph = a_token, a_graph
        self._direct = warmup.DISPATCHES["direct"]
        monkeypatch.setitem(warmup.DISPATCHES, "direct", self._record)
        monkeypatch.setattr(warmup, "graph_bytes", lambda device: 5 * MIB + self.held())
        monkeypatch.setattr(warmup, "release", lambda compiled, device: self._release(compiled))

    def held(self) -> int:
        return (self.pool if self.live else 0) + len(self.live) * self._a_graph

    def _record(self, step: Step, *arguments: object, **options: object) -> CompiledStep:
        compiled = self._direct(step, *arguments, **options)  # type: ignore[arg-type]
        self.pool = max(self.pool if self.live else 0, step.size * self._a_token)
        self.live.append(step.size)
        return compiled

    def _release(self, compiled: CompiledStep) -> None:
        self.live.pop()


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (
            53,
            [
                "prefill-48-greedy",
                "decode-4-greedy",
                "decode-2-greedy",
                "prefill-16-greedy",
                "decode-1-greedy",
            ],
        ),
        (52, ["prefill-48-greedy", "decode-4-greedy", "decode-2-greedy", "prefill-16-greedy"]),
        (51, ["prefill-48-greedy", "decode-4-greedy", "decode-2-greedy"]),
        (49, ["prefill-48-greedy"]),
        (48, ["decode-4-greedy", "decode-2-greedy", "prefill-16-greedy", "decode-1-greedy"]),
        (1, []),
    ],
)
def test_the_least_useful_buckets_are_left_out(
    budget: int, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = _Device(monkeypatch, a_token=MIB, a_graph=MIB * 9 // 10)
    model = tiny_model("llama")
    reference = Reference(model)
    config = small_config(buckets={"decode": [1, 2]}, memory={"graphs": f"{budget}MiB"})
    prompts = [prompt_of(5), prompt_of(40)]
    with CompiledLLM(model, None, config, progress=False) as llm:
        assert greedy(llm, prompts, 8) == [reference(prompt, 8) for prompt in prompts]
        report = llm.report()
    assert device.held() <= 1.05 * budget * MIB
    assert {bucket.bucket for bucket in report.buckets if bucket.state == "compiled"} == set(kept)
    left_out = [bucket for bucket in report.buckets if bucket.state == "left out"]
    assert len(left_out) == 5 - len(kept)
    for bucket in left_out:
        assert f"of memory.graphs={budget}.0 MiB" in str(bucket.failure)
        assert bucket.bucket in report.warnings[0]
        assert bucket.bucket in str(report)
    assert all(
        "was left out: graphs take" in reason for reason in [*report.fallbacks, *report.stand_ins]
    )


def test_without_a_budget_all_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch, a_token=MIB, a_graph=MIB)
    with CompiledLLM(tiny_model("llama"), None, small_config(), progress=False) as llm:
        assert {bucket.state for bucket in llm.report().buckets} == {"compiled"}
        taken = {bucket.bucket: bucket.bytes // MIB for bucket in llm.report().buckets}
    assert taken == {
        "prefill-48-greedy": 49,
        "prefill-16-greedy": 1,
        "decode-4-greedy": 1,
        "decode-2-greedy": 1,
    }
    assert device.live == [48, 16, 4, 2], "large to small"


GPU = torch.device("cuda", 0)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    free=st.integers(2**31, 2**37),
    activations=st.integers(0, 2**28),
    graphs=st.integers(1, 2**28),
    windows=st.lists(st.sampled_from([0, 0, 512, 1024]), min_size=1, max_size=48),
    block_size=st.sampled_from([16, 32, 128]),
)
def test_the_cache_takes_the_remaining_memory(
    free: int,
    activations: int,
    graphs: int,
    windows: list[int],
    block_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total = 2**37
    monkeypatch.setattr(kv_cache, "free_bytes", lambda device: free)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total)
    )
    layers = [
        AttentionLayer(
            name=str(n),
            num_heads=8,
            num_kv_heads=8,
            key_dim=128,
            value_dim=128,
            reach=AttentionReach.decode(window),
            softcap=0.0,
            sinks=False,
            alibi=False,
            dtype=torch.bfloat16,
        )
        for n, window in enumerate(windows)
    ]
    config = parse_config(
        {
            "memory": {"graphs": graphs},
            "cache": {"block_size": block_size, "gpu_memory_utilization": 1.0},
        }
    )
    limits = Limits(max_num_seqs=100_000, max_num_batched_tokens=2048, max_model_len=4096)
    reserved = activations + reserved_for_graphs(config, GPU)
    assert reserved == activations + graphs
    try:
        groups = kv_cache.plan_groups(config.cache, layers, limits, GPU, reserved=reserved)
    except ValueError:
        reject()  # not even one sequence fits
    pages = [block_size * sum(layers[n].bytes_per_token for n in group.layers) for group in groups]
    taken = sum(group.num_pages * size for group, size in zip(groups, pages, strict=True))
    left = free - reserved
    assert taken <= left
    assert taken >= 0.99 * left - sum(pages), "or a page of each group, where pages are large"


def test_bytes_reserved_for_graphs() -> None:
    wanted = {"memory": {"graphs": "1GiB"}}
    assert reserved_for_graphs(parse_config(wanted), GPU) == 2**30
    assert reserved_for_graphs(parse_config({}), GPU) == 0
    assert reserved_for_graphs(parse_config(wanted), torch.device("cpu")) == 0
    assert reserved_for_graphs(parse_config({**wanted, "compile": {"dispatch": "eager"}}), GPU) == 0
    assert CacheConfig().memory == "auto"
    assert cuda_graph_trees.graph_bytes(torch.device("cpu")) == 0
