"""Compilation of steps: passes, generated code, many buckets, failures."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.errors import StrictError
from compiled_llm.runtime.capture import warmup
from passes import PASSES, PassError
from tests.conftest import DEVICE
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

ONE_EACH = {"buckets": {"decode": [4], "prefill": [48]}}


def test_generated_code_copies_no_cache() -> None:
    """One kernel writes each cache, attention reads it, and no allocation is as large as it."""
    codes: list[str] = []
    with (
        fresh_cache(),
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        CompiledLLM(tiny_model("llama"), None, small_config(**ONE_EACH), progress=False) as llm,
    ):
        cache = llm.model_runner.memory.caches[0].k
    assert len(codes) == 2
    shape = re.escape(str(tuple(cache.shape)))
    for code in codes:
        body = re.search(r"def call\(.*?\n +return ", code, re.DOTALL).group()
        caches = re.findall(rf"assert_size_stride\((\w+), {shape}", body)
        assert len(caches) == 4, "keys and values of two layers"
        sizes = [eval(size) for size in re.findall(r"empty_strided\w*\((\([^()]*\))", body)]
        assert sizes
        assert all(torch.Size(size).numel() < cache.numel() for size in sizes)
        for name in caches:
            uses = [
                line
                for line in body.splitlines()
                if re.search(rf"\b{name}\b", line) and "assert_size" not in line
            ]
            calls = [line for line in uses if not re.match(r" +del |.* = args$", line)]
            assert [re.search(r"fused|paged_attention", line).group() for line in calls] == [
                "fused",
                "paged_attention",
            ]
        assert len(re.findall(r"[.:]cos\(", code)) <= 2, (
            "once for all layers, in a loop and in its remainder"
        )


def test_passes_report_and_dump(tmp_path: Path) -> None:
    config = small_config(**ONE_EACH, compile={"dump": tmp_path})
    with fresh_cache(), CompiledLLM(tiny_model("qwen3"), None, config, progress=False) as llm:
        reports = {bucket.bucket: bucket.passes for bucket in llm.report().buckets}
    for name in ("prefill-48-greedy", "decode-4-greedy"):
        attention, rotary, once, merge, linear = reports[name]
        assert (attention.name, attention.matches, attention.expected) == (
            "lower_attention_marker",
            2,
            2,
        )
        assert (rotary.name, rotary.matches, rotary.expected) == ("rotary_outer_product", 1, 1)
        assert (once.name, once.matches) == ("hoist_step_invariants", 4), (
            "cosine, sine, page and offset"
        )
        assert (merge.name, merge.matches, merge.expected) == ("merge_projections", 4, 4)
        # On CPUs in float32, for few tokens: qkv, o, gate and up, down, twice, and the lm_head.
        assert (linear.name, linear.matches) == (
            "fuse_skinny_linear",
            9 if DEVICE.type == "cpu" and name.startswith("decode") else 0,
        )
        assert attention.ops_after > attention.ops_before
        before = (tmp_path / name / "0-lower_attention_marker-before.txt").read_text()
        after = (tmp_path / name / "0-lower_attention_marker-after.txt").read_text()
        assert (
            before.count("attention_marker.default]")
            == after.count("paged_attention.default]")
            == 2
        )
        assert "attention_marker" not in after


@pytest.mark.parametrize("off", list(PASSES))
def test_disabling_a_pass_changes_no_token(off: str) -> None:
    model = tiny_model("llama")
    reference = Reference(model)
    prompts = [prompt_of(length) for length in (5, 30, 60)]
    with CompiledLLM(
        model, None, small_config(**ONE_EACH, passes={off: False}), progress=False
    ) as llm:
        assert greedy(llm, prompts, 12) == [reference(prompt, 12) for prompt in prompts]
        assert off not in {
            graph_pass.name for bucket in llm.report().buckets for graph_pass in bucket.passes
        }


def test_a_layer_without_a_match_is_named() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def forward(hidden_states, **arguments):  # type: ignore[no-untyped-def]
        return (
            (hidden_states, None)
            if torch.compiler.is_compiling()
            else original(hidden_states, **arguments)
        )

    attention.forward = forward
    missed = r"it missed model\.layers\.1\.self_attn"
    expected = rf"'lower_attention_marker' expected 2 matches and made 1; {missed}"
    with pytest.raises(PassError, match=expected):
        CompiledLLM(model, None, small_config(**ONE_EACH), progress=False)


@pytest.mark.parametrize("dispatch", ["direct", "torch"])
def test_more_than_twenty_buckets_all_replay(dispatch: str) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    config = small_config(
        limits={"max_num_seqs": 21, "max_num_batched_tokens": 128, "max_model_len": 64},
        buckets={"decode": list(range(1, 22)), "prefill": [128], "samplers": ["greedy"]},
        compile={"dispatch": dispatch, "options": {"cpp.simdlen": 1}},  # plain loops compile faster
        strict=True,
    )
    reference = Reference(model)
    with CompiledLLM(model, None, config, progress=False) as llm:
        prompts = [prompt_of(3 + number % 5, number) for number in range(21)]
        params = range(2, 23)
        outputs = llm.generate(
            prompts, [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in params]
        )
        assert [o.outputs[0].token_ids for o in outputs] == [
            reference(p, n) for p, n in zip(prompts, params, strict=True)
        ]
        report = llm.report()
    assert not report.fallbacks
    assert not any(report.graph_events.values())
    # One row less at each step; the last token of each request needs no further step.
    assert [b.replays for b in report.buckets if b.bucket.startswith("decode")] == [1] * 21


def test_the_next_bucket_replaces_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    direct = warmup.DISPATCHES["direct"]

    def failing(step, *arguments):  # type: ignore[no-untyped-def]
        if step.size == 2:
            raise RuntimeError("injected failure\nwith a second line")
        return direct(step, *arguments)

    monkeypatch.setitem(warmup.DISPATCHES, "direct", failing)
    model = tiny_model("llama")
    reference = Reference(model)
    config = {"buckets": {"decode": [2], "prefill": [48]}}
    with CompiledLLM(model, None, small_config(**config), progress=False) as llm:
        for lengths in ([5, 9, 30], [12], [6, 7]):
            prompts = [prompt_of(length) for length in lengths]
            assert greedy(llm, prompts, 10) == [reference(prompt, 10) for prompt in prompts]
        report = llm.report()
    failure = "bucket decode-2-greedy is not used: RuntimeError: injected failure"
    assert [record.getMessage() for record in caplog.records] == [failure]
    assert report.stand_ins == {
        "decode-2-greedy failed: RuntimeError: injected failure; decode-4-greedy served": 18
    }
    assert not report.fallbacks
    states = {
        bucket.bucket: (bucket.state == "failed", bucket.replays) for bucket in report.buckets
    }
    assert states == {
        "decode-2-greedy": (True, 0),
        "decode-4-greedy": (False, 27),
        "prefill-48-greedy": (False, 3),
    }
    with pytest.raises(
        StrictError,
        match="bucket decode-2-greedy could not be compiled: RuntimeError: injected failure",
    ):
        CompiledLLM(model, None, small_config(**config, strict=True), progress=False)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("tried to allocate 2 GiB"), MemoryError()]
)
@pytest.mark.parametrize("when", ["compile", "capture"])
def test_out_of_memory_fails_one_bucket_only(
    error: Exception, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = warmup.DISPATCHES["direct"]

    def failing(step, *arguments):  # type: ignore[no-untyped-def]
        if step.size == 48 and when == "compile":
            raise error
        compiled = direct(step, *arguments)
        if step.size == 48:
            raise error
        return compiled

    monkeypatch.setitem(warmup.DISPATCHES, "direct", failing)
    model = tiny_model("llama")
    reference = Reference(model)
    with CompiledLLM(model, None, small_config(), progress=False) as llm:
        for prompts in ([prompt_of(5), prompt_of(60)], [prompt_of(12)]):
            assert greedy(llm, prompts, 10) == [reference(prompt, 10) for prompt in prompts]
        report = llm.report()
    assert [bucket.bucket for bucket in report.buckets if bucket.failure] == ["prefill-48-greedy"]
    assert {reason.partition(":")[0] for reason in report.fallbacks} <= {"prefill-48-greedy failed"}
    assert all(
        bucket.replays
        for bucket in report.buckets
        if bucket.bucket in ("prefill-16-greedy", "decode-2-greedy")
    )


def test_steps_run_eagerly_if_the_largest_bucket_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(step, *arguments):  # type: ignore[no-untyped-def]
        raise RuntimeError("injected failure")

    monkeypatch.setitem(warmup.DISPATCHES, "direct", failing)
    model = tiny_model("llama")
    reference = Reference(model)
    with CompiledLLM(model, None, small_config(), progress=False) as llm:
        assert greedy(llm, [prompt_of(20)], 8) == [reference(prompt_of(20), 8)]
        failed = "failed: RuntimeError: injected failure"
        assert llm.report().fallbacks == {
            f"prefill-48-greedy {failed}": 1,
            f"decode-2-greedy {failed}": 7,
        }


def test_a_step_without_a_bucket_is_counted() -> None:
    model = tiny_model("llama")
    reference = Reference(model)
    config = {"buckets": {"decode": [4], "prefill": []}}
    with CompiledLLM(model, None, small_config(**config), progress=False) as llm:
        assert greedy(llm, [prompt_of(20)], 8) == [reference(prompt_of(20), 8)]
        assert llm.report().fallbacks == {"no prefill bucket holds 20 with the greedy sampler": 1}
    strict = CompiledLLM(model, None, small_config(**config, strict=True), progress=False)
    with strict, pytest.raises(ValueError, match="no prefill bucket serves the greedy sampler"):
        greedy(strict, [prompt_of(20)], 8)


def test_a_thread_that_traced_may_end() -> None:
    """Without a GPU, the next trace would crash the process without the guard (see `compiler`)."""
    code = """
        import threading
        import torch
        import compiled_llm.runtime.compilation.compiler
        from torch._subclasses import FakeTensorMode

        def trace():
            with FakeTensorMode():
                torch.empty(2) + 1

        thread = threading.Thread(target=trace)
        thread.start()
        thread.join()
        memory = [torch.randn(n) for n in range(10000)]
        trace()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
