"""Buckets against eager: honest ones pass and are not disturbed, wrong ones are caught and not used."""

from collections.abc import Callable, Iterator
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
from compiled_llm.runtime.verify import verify as verifying
from compiled_llm.runtime.verify.random_batches import make_trial
from compiled_llm.runtime.verify.verify import ALLOWED, _failure, _Findings, verify
from passes.ops import cpu, paged_attention
from tests.conftest import DEVICE
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model
from tests.model_sweep.tiny_configs import tiny_config
from tests.model_sweep.tiny_model import tiny_model as shrunk_model

EACH_SAMPLER = {"decode": [4], "prefill": [48], "samplers": ["greedy", "random", "full", "scoring"]}
BUCKETS = [
    *(Bucket("prefill", 48, sampler) for sampler in ("greedy", "random", "full", "scoring")),
    *(Bucket("decode", 4, sampler) for sampler in ("greedy", "random", "full")),
]  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> Iterator[CompiledLLM]:
    """Windows and full attention, and each sampler."""
    config = small_config(buckets=EACH_SAMPLER, verify=True)
    with CompiledLLM(tiny_model("gemma2"), None, config, progress=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def llm_with_states() -> Iterator[CompiledLLM]:
    config = small_config(
        buckets={"decode": [4], "prefill": [48], "samplers": ["full"]}, verify=True
    )
    with CompiledLLM(
        shrunk_model(tiny_config("lfm2")).to(DEVICE), None, config, progress=False
    ) as engine:
        yield engine


def _launch(llm: CompiledLLM, bucket: Bucket) -> Callable[[], object]:
    compiled = llm.model_runner.entries[bucket].compiled
    assert compiled is not None
    return compiled.launch


def test_honest_buckets_pass(llm: CompiledLLM) -> None:
    assert {bucket.bucket for bucket in llm.report().buckets} == {str(bucket) for bucket in BUCKETS}
    for bucket in llm.report().buckets:
        found = bucket.verification
        assert found is not None
        assert found.failure is bucket.failure is None
        assert found.agreement == 1.0
        assert found.error < 0.1 * found.allowed
        assert found.cache_difference > 0, "two ways to compute something differ in some bit"
        assert (found.logit_difference is None) == bucket.bucket.endswith(("greedy", "random"))
    assert "scoring" in llm.report().verification()


def test_honest_buckets_pass_where_layers_see_chunks() -> None:
    model = shrunk_model(tiny_config("llama4_text")).to(DEVICE)
    config = small_config(
        buckets={"decode": [], "prefill": [48], "samplers": ["full"]}, verify=True
    )
    with CompiledLLM(model, None, config, progress=False) as llm:
        assert any(group.window < 0 for group in llm.model_runner.memory.groups)
        reports = llm.report().buckets
    assert [report.verification.failure for report in reports if report.verification] == [
        None
    ] * len(reports)


def test_honest_buckets_pass_where_layers_have_states(llm_with_states: CompiledLLM) -> None:
    memory = llm_with_states.model_runner.memory
    assert memory.states is not None
    for report in llm_with_states.report().buckets:
        assert report.verification is not None
        assert report.verification.failure is None
    for slots in memory.states.slots:
        slots.uniform_()
    before = [slots.clone() for slots in memory.states.slots]
    for bucket in (Bucket("prefill", 48, "full"), Bucket("decode", 4, "full")):
        launch = _launch(llm_with_states, bucket)
        assert (
            verify(
                bucket, launch, llm_with_states.model, memory, llm_with_states.model_runner.limits
            ).failure
            is None
        )
        assert all(torch.equal(*pair) for pair in zip(before, memory.states.slots, strict=True))


def _forgets(states: list[torch.Tensor], launch: Callable[[], object]) -> None:
    kept = [slots.clone() for slots in states]
    launch()
    for slots, before in zip(states, kept, strict=True):
        slots.copy_(before)


def _begins_anew(states: list[torch.Tensor], launch: Callable[[], object]) -> None:
    for slots in states:
        slots.zero_()
    launch()


def _writes_to_all(states: list[torch.Tensor], launch: Callable[[], object]) -> None:
    launch()
    for slots in states:
        slots.nan_to_num_()


@pytest.mark.parametrize(
    "bucket", [Bucket("prefill", 48, "full"), Bucket("decode", 4, "full")], ids=str
)
@pytest.mark.parametrize("fault", [_forgets, _begins_anew, _writes_to_all])
def test_wrong_states_are_caught(
    llm_with_states: CompiledLLM,
    bucket: Bucket,
    fault: Callable[[list[torch.Tensor], Callable[[], object]], None],
) -> None:
    memory, launch = llm_with_states.model_runner.memory, _launch(llm_with_states, bucket)
    assert memory.states is not None
    slots = memory.states.slots
    found = verify(
        bucket,
        lambda: fault(slots, launch),
        llm_with_states.model,
        memory,
        llm_with_states.model_runner.limits,
    )
    assert found.failure is not None


def test_it_leaves_no_trace(llm: CompiledLLM) -> None:
    """In the middle of requests, with pages shared and full."""
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
        assert (
            verify(bucket, _launch(llm, bucket), llm.model, memory, llm.model_runner.limits).failure
            is None
        )
        for module in (memory.state, memory.caches):
            assert all(torch.equal(buffer, kept[name]) for name, buffer in module.named_buffers())
        assert llm.report() == report
    while llm.engine.has_work:
        llm.engine.step()
    assert [job.requests[0].token_ids for job in jobs] == [
        reference(prompt, 12) for prompt in prompts
    ]


def _wrong_token(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    launch()
    llm.model_runner.memory.state.tokens.add_(1)


def _wrong_length(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    """Of what a decode step attends to; a prefill step attends to another prompt."""
    state = llm.model_runner.memory.state
    state.positions.sub_(1).clamp_(min=0)
    state.prefill[:1].add_(1)
    launch()


def _wrong_page(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    launch()
    for cache in llm.model_runner.memory.caches:
        cache.v[1:, -1] = 7.0


def _writes_nothing(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    kept = [cache.k.clone() for cache in llm.model_runner.memory.caches]
    launch()
    for cache, before in zip(llm.model_runner.memory.caches, kept, strict=True):
        cache.k.copy_(before)


def _drops_a_layer(llm: CompiledLLM, launch: Callable[[], object]) -> None:
    """The last, which writes its keys and values all the same."""
    weight = llm.model.model.layers[-1].self_attn.o_proj.weight
    kept = weight.clone()
    weight.zero_()
    launch()
    weight.copy_(kept)


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
@pytest.mark.parametrize(
    "fault", [_wrong_token, _wrong_length, _wrong_page, _writes_nothing, _drops_a_layer]
)
def test_wrong_buckets_are_caught(
    llm: CompiledLLM, bucket: Bucket, fault: Callable[[CompiledLLM, Callable[[], object]], None]
) -> None:
    with torch.no_grad():
        found = verify(
            bucket,
            lambda: fault(llm, _launch(llm, bucket)),
            llm.model,
            llm.model_runner.memory,
            llm.model_runner.limits,
        )
    assert found.failure is not None
    assert (
        verify(
            bucket,
            _launch(llm, bucket),
            llm.model,
            llm.model_runner.memory,
            llm.model_runner.limits,
        ).failure
        is None
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_few_bits_honest_and_wrong_are_far_apart(dtype: torch.dtype) -> None:
    config = small_config(buckets={"decode": [4], "prefill": [], "samplers": ["full"]}, verify=True)
    bucket = Bucket("decode", 4, "full")
    with CompiledLLM(tiny_model("llama").to(dtype), None, config, progress=False) as llm:
        honest = llm.report().buckets[0].verification
        assert honest is not None
        assert honest.failure is None
        assert honest.error < ALLOWED[dtype] / 4
        with torch.no_grad():
            wrong = verify(
                bucket,
                lambda: _wrong_length(llm, _launch(llm, bucket)),
                llm.model,
                llm.model_runner.memory,
                llm.model_runner.limits,
            )
        assert wrong.error > 2 * ALLOWED[dtype]


def test_with_experts_and_few_bits_some_tokens_may_be_routed_otherwise() -> None:
    errors = torch.tensor([0.1] * 10 + [2.0] * 2)
    found = _Findings(token_errors=[errors], row_errors=[errors])
    assert _failure(found, 1.0, 0.25) is None
    assert str(_failure(found, 1.0, 0.0)).startswith(
        "2 of 12 tokens differ from eager, by up to 2 standard deviations"
    )
    assert str(_failure(found, 0.05, 0.25)).startswith("12 of 12 tokens")


@pytest.mark.parametrize("seen", [8, 2100])
def test_a_wrong_kernel_is_caught(seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It attends to the first keys alone. The eager step must not run it, too, and one sequence must be long."""
    for module in (cpu, paged_attention):  # what runs on a CPU, and on a GPU
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
        bucket, model_runner = Bucket("decode", 4, "greedy"), llm.model_runner
        found = verify(
            bucket, _launch(llm, bucket), llm.model, model_runner.memory, model_runner.limits
        )
        assert "differ from eager" in str(found.failure)
        assert found.error > 10 * found.allowed
        monkeypatch.setattr(verifying, "_FIRST", ("full",))
        short = verify(
            bucket, _launch(llm, bucket), llm.model, model_runner.memory, model_runner.limits
        )
        assert (short.failure is None) == (seen == 2100)


def test_a_kernel_that_is_right_is_right_in_long_sequences() -> None:
    """Also with a window, and a chunk at the end of a prompt; its old pages are used several times, new ones once."""
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 4090}
    config = small_config(limits=limits, buckets={"decode": [4], "prefill": [48]})
    with CompiledLLM(
        tiny_model("gemma2", max_position_embeddings=4096), None, config, progress=False
    ) as llm:
        memory, bounds = llm.model_runner.memory, llm.model_runner.limits
        for bucket in (Bucket("decode", 4, "greedy"), Bucket("prefill", 48, "greedy")):
            trial = make_trial(bucket, memory, bounds, seed=1, extent="long")
            assert trial.starts[0] + trial.counts[0] == 4090
            for group, members in enumerate(memory.groups):
                written = trial.slots(group, memory.block_size, new=True)
                assert len(set(written)) == len(written)
                assert set(written).isdisjoint(trial.slots(group, memory.block_size, new=False))
                assert (
                    members.window or len(set(trial.tables[group, 0])) < 4090 // memory.block_size
                )
            assert verify(bucket, _launch(llm, bucket), llm.model, memory, bounds).failure is None


@pytest.mark.parametrize("token", [-1, 160])
def test_what_is_no_token_is_caught(llm: CompiledLLM, token: int) -> None:
    """As a step reports it for a row whose scores are not finite; it is no index."""
    bucket, state = BUCKETS[4], llm.model_runner.memory.state

    def launch() -> None:
        _launch(llm, bucket)()
        state.ring_tokens.fill_(token)

    found = verify(bucket, launch, llm.model, llm.model_runner.memory, llm.model_runner.limits)
    assert found.failure == "it chose tokens that are not in the vocabulary, or none"

    def launch_wholly() -> None:
        launch()
        state.tokens.fill_(token)

    found = verify(
        bucket, launch_wholly, llm.model, llm.model_runner.memory, llm.model_runner.limits
    )
    assert str(found.failure).startswith("it chose tokens that are not in the vocabulary, or none")


def test_a_report_of_other_tokens_is_caught(llm: CompiledLLM) -> None:
    bucket = BUCKETS[4]

    def launch() -> None:
        _launch(llm, bucket)()
        llm.model_runner.memory.state.ring_tokens.add_(1).remainder_(160)

    found = verify(bucket, launch, llm.model, llm.model_runner.memory, llm.model_runner.limits)
    assert found.failure == "it reported other tokens than its rows go on with"


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
        assert greedy(llm, prompts, 10) != expected, "the fault does something"
    config = small_config(verify=True, compile={"artifact": str(tmp_path / "artifact")})
    with CompiledLLM(model, None, config, progress=False) as llm:
        assert greedy(llm, prompts, 10) == expected
        report = llm.report()
    (wrong,) = [bucket for bucket in report.buckets if bucket.failure is not None]
    assert (wrong.bucket, wrong.mode, wrong.replays) == ("decode-2-greedy", "eager", 0)
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
    }, "nor is it kept"
    with pytest.raises(StrictError, match="bucket decode-2-greedy is not what eager is"):
        CompiledLLM(model, None, small_config(verify=True, strict=True), progress=False)
