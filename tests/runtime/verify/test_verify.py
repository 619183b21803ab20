"""Verification passes correct buckets, without side effects, and failing buckets are not used."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.errors import StrictError
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.capture import warmup
from compiled_llm.runtime.compilation.compiler import CompiledStep
from compiled_llm.runtime.step.step import Step
from compiled_llm.runtime.verify import verify as verify_module
from compiled_llm.runtime.verify.random_batches import make_random_batch
from compiled_llm.runtime.verify.verify import verify
from passes.ops import cpu, paged_attention
from tests.conftest import DEVICE
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as shrunk_model
from tests.runtime.verify.conftest import BUCKETS, launch_of


def test_correct_buckets_pass(llm: CompiledLLM) -> None:
    assert {bucket.bucket for bucket in llm.report().buckets} == {str(bucket) for bucket in BUCKETS}
    for bucket in llm.report().buckets:
        found = bucket.verification
        assert found is not None
        assert found.failure is bucket.failure is None
        assert found.agreement == 1.0
        assert found.error < 0.1 * found.allowed
        assert found.cache_difference > 0, "two ways to compute the same values differ in some bit"
        assert (found.logit_difference is None) == bucket.bucket.endswith(("greedy", "random"))
    assert "scoring" in llm.report().render_verification()


def test_correct_buckets_pass_with_chunked_attention() -> None:
    model = shrunk_model(tiny_config("llama4_text")).to(DEVICE)
    config = small_config(
        buckets={"decode": [], "prefill": [48], "samplers": ["full"]}, verify=True
    )
    with CompiledLLM(model, None, config, progress=False) as llm:
        assert any(group.reach.kind == "chunked" for group in llm.model_runner.memory.groups)
        reports = llm.report().buckets
    assert [report.verification.failure for report in reports if report.verification] == [
        None
    ] * len(reports)


def test_correct_buckets_pass_with_recurrent_states(llm_with_states: CompiledLLM) -> None:
    memory = llm_with_states.model_runner.memory
    assert memory.states is not None
    for report in llm_with_states.report().buckets:
        assert report.verification is not None
        assert report.verification.failure is None
    for slots in memory.states.slots:
        slots.uniform_()
    before = [slots.clone() for slots in memory.states.slots]
    for bucket in (Bucket("prefill", 48, "full"), Bucket("decode", 4, "full")):
        launch = launch_of(llm_with_states, bucket)
        assert verify(bucket, launch, llm_with_states.model_runner.context).failure is None
        assert all(torch.equal(*pair) for pair in zip(before, memory.states.slots, strict=True))


def test_state_and_pages_are_restored(llm: CompiledLLM) -> None:
    """Between steps of requests, with pages that are shared and full."""
    reference = Reference(llm.model)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [prompt_of(length) for length in (20, 33)]
    jobs = [llm._runner.processor.process(prompt, params) for prompt in prompts]
    for job in jobs:
        llm.engine.add_request(job.requests[0])
    for step in range(9):
        llm.engine.step()
        memory = llm.model_runner.memory
        kept = {
            name: buffer.clone()
            for module in (memory.state, memory.caches)
            for name, buffer in module.named_buffers()
        }
        bucket, report = BUCKETS[step % len(BUCKETS)], replace(llm.report())
        found = verify(bucket, launch_of(llm, bucket), llm.model_runner.context)
        assert found.failure is None
        for module in (memory.state, memory.caches):
            assert all(torch.equal(buffer, kept[name]) for name, buffer in module.named_buffers())
        assert llm.report() == report
    while llm.engine.has_work:
        llm.engine.step()
    assert [job.requests[0].token_ids for job in jobs] == [
        reference(prompt, 12) for prompt in prompts
    ]


@pytest.mark.parametrize("seen", [8, 2100])
def test_a_wrong_kernel_is_caught(seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It attends to the first keys alone.

    This shows if the eager step does not run the kernel and if one sequence is long.
    """
    for module in (cpu, paged_attention):  # for a CPU and for a GPU
        kernel = module.decode_attention

        def wrong(*arguments: Any, kernel: Callable[..., object] = kernel) -> object:
            q, k_cache, v_cache, table, lengths, *others = arguments
            return kernel(q, k_cache, v_cache, table, lengths.clamp(max=seen), *others)

        monkeypatch.setattr(module, "decode_attention", wrong)
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 4096}
    config = small_config(limits=limits, buckets={"decode": [4], "prefill": []})
    with CompiledLLM(
        tiny_model("llama", max_position_embeddings=4096), None, config, progress=False
    ) as llm:
        bucket = Bucket("decode", 4, "greedy")
        found = verify(bucket, launch_of(llm, bucket), llm.model_runner.context)
        assert "differ from eager" in str(found.failure)
        assert found.error > 10 * found.allowed
        monkeypatch.setattr(verify_module, "_FIRST_SHAPES", ("full",))
        short = verify(bucket, launch_of(llm, bucket), llm.model_runner.context)
        assert (short.failure is None) == (seen == 2100)


def test_a_correct_kernel_passes_with_long_sequences() -> None:
    """Also with a window, and a chunk at the end of a prompt.

    Cached pages are used several times, new ones once.
    """
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 4090}
    config = small_config(limits=limits, buckets={"decode": [4], "prefill": [48]})
    with CompiledLLM(
        tiny_model("gemma2", max_position_embeddings=4096), None, config, progress=False
    ) as llm:
        memory, bounds = llm.model_runner.memory, llm.model_runner.limits
        for bucket in (Bucket("decode", 4, "greedy"), Bucket("prefill", 48, "greedy")):
            batch = make_random_batch(bucket, memory, bounds, seed=1, shape="long")
            assert batch.num_cached[0] + batch.num_new[0] == 4090
            for group, members in enumerate(memory.groups):
                written = batch.new_slots(group, memory.block_size)
                assert len(set(written)) == len(written)
                assert set(written).isdisjoint(batch.cached_slots(group, memory.block_size))
                assert (
                    not members.reach.is_full
                    or len(set(batch.pages.tables[group, 0])) < 4090 // memory.block_size
                )
            assert verify(bucket, launch_of(llm, bucket), llm.model_runner.context).failure is None


@pytest.fixture
def wrong_decode_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode bucket of size 2 chooses the token next to the right one."""
    direct = warmup.DISPATCHES["direct"]

    def wrong(step: Step, *arguments: object, **options: object) -> CompiledStep:
        compiled = direct(step, *arguments, **options)  # type: ignore[arg-type]

        def launch() -> None:
            compiled.launch()
            step.state.tokens.add_(1)
            step.state.ring_tokens.add_(1)

        return replace(compiled, launch=launch) if step.size == 2 else compiled

    monkeypatch.setitem(warmup.DISPATCHES, "direct", wrong)


@pytest.mark.usefixtures("wrong_decode_2")
def test_a_wrong_bucket_is_not_used(tmp_path: Path) -> None:
    model = tiny_model("llama")
    reference = Reference(model)
    prompts = [prompt_of(5), prompt_of(20)]
    expected = [reference(prompt, 10) for prompt in prompts]
    unverified = small_config()
    with CompiledLLM(model, None, unverified, progress=False) as llm:
        assert greedy(llm, prompts, 10) != expected, "the fault changes the tokens"
    config = small_config(verify=True, compile={"artifact": str(tmp_path / "artifact")})
    with CompiledLLM(model, None, config, progress=False) as llm:
        assert greedy(llm, prompts, 10) == expected
        report = llm.report()
    (wrong,) = [bucket for bucket in report.buckets if bucket.failure is not None]
    assert (wrong.bucket, wrong.state, wrong.replays) == ("decode-2-greedy", "failed", 0)
    assert str(wrong.failure).startswith("verification: ")
    assert wrong.verification is not None
    assert wrong.verification.agreement == 0
    assert list(report.stand_ins) == [
        f"decode-2-greedy failed: {wrong.failure}; decode-4-greedy served"
    ]
    assert (
        report.stand_ins.total()
        == {b.bucket: b.replays for b in report.buckets}["decode-4-greedy"]
        >= 8
    )
    assert not report.fallbacks
    assert str(wrong.failure)[:40] in str(report)
    assert report.to_dict()["buckets"][2]["verification"]["failure"] in str(wrong.failure)
    names = {path.name for path in (tmp_path / "artifact").glob("*.bucket")}
    assert names == {
        "prefill-16-greedy.bucket",
        "prefill-48-greedy.bucket",
        "decode-4-greedy.bucket",
    }, "it is not saved either"
    with pytest.raises(StrictError, match="bucket decode-2-greedy does not match eager"):
        CompiledLLM(model, None, small_config(verify=True, strict=True), progress=False)
