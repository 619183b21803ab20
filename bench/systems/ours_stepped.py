"""compiled_llm stepped by hand, which times and profiles single decode steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.systems.ours import Ours
from bench.trace import Span, count_launches, device_spans
from bench.workloads import random_prompts

_MAX_PREFILL_STEPS = 30  # profiled; traces of prefill are large


class OursStepped(Ours):
    """`Ours` with access to single steps."""

    def decode(
        self, batch: int, context: int, steps: int, rounds: int, vocab_size: int
    ) -> dict[str, Any]:
        """Time decode steps of `batch` sequences after prompts of `context` tokens.

        Returns:
            `step_ms` and `host_us` (lists, one value per round: wall milliseconds and host
            microseconds per step), `bucket` (the most used), `padded_share` and `batch`.
        """
        step_ms: list[float] = []
        host_us: list[float] = []
        with self._decoding(batch, context, 2 + steps * (rounds + 1), vocab_size):
            self._run(steps)
            before = self._replays()
            for _ in range(rounds):
                seconds, host_seconds = self._run(steps)
                step_ms.append(seconds / steps * 1e3)
                host_us.append(host_seconds / steps * 1e6)
            used = {name: count - before.get(name, 0) for name, count in self._replays().items()}
        sizes = {bucket.bucket: bucket.size for bucket in self.llm.report().buckets}
        bucket = max(used, key=lambda name: used[name]) if any(used.values()) else "eager"
        return {
            "batch": batch,
            "step_ms": step_ms,
            "host_us": host_us,
            "bucket": bucket,
            "padded_share": 1 - batch / sizes[bucket] if bucket in sizes else 0.0,
        }

    def profile(self, batch: int, context: int, steps: int, vocab_size: int) -> dict[str, Any]:
        """Profile decode steps; return their number, launches by kind, and device spans.

        On a CPU there are no launches and no spans.
        """
        with self._decoding(batch, context, 2 + 2 * steps, vocab_size):
            self._run(2)
            counts, spans = self._profiled(steps)
        return {"steps": steps, "launches": counts, "spans": spans}

    def profile_workload(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float, steps: int
    ) -> dict[str, list[Span]]:
        """Profile a workload; return the device spans of steps with prefill and of decode steps."""
        spans = {}
        with self._requests(prompts, output_lengths, temperature):
            engine = self.llm.engine
            for _ in range(min(10, len(prompts))):
                engine.step()
            spans["prefill"] = self._profiled(min(steps, _MAX_PREFILL_STEPS))[1]
            while engine.num_waiting:
                engine.step()
            self._run(20)
            spans["decode"] = self._profiled(steps)[1]
        return spans

    def _profiled(self, steps: int) -> tuple[dict[str, int], list[Span]]:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.llm.model.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiled:
            self._run(steps)
        assert profiled.profiler is not None
        events = profiled.profiler.kineto_results.events()
        return count_launches(event.name() for event in events), device_spans(events)

    def _run(self, steps: int) -> tuple[float, float]:
        """Run steps; return their wall seconds, device work included, and their host seconds."""
        stats = self.llm.report().scheduling
        self._synchronize()
        began = time.perf_counter()
        host_before = stats.host_seconds
        for _ in range(steps):
            self.llm.engine.step()
        self._synchronize()
        return time.perf_counter() - began, stats.host_seconds - host_before

    def _replays(self) -> dict[str, int]:
        return {bucket.bucket: bucket.replays for bucket in self.llm.report().buckets}

    def _synchronize(self) -> None:
        import torch

        if self.llm.model.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _decoding(
        self, batch: int, context: int, num_tokens: int, vocab_size: int
    ) -> Iterator[None]:
        """Enter with `batch` sequences in decode, each with at least `num_tokens` to generate."""
        engine = self.llm.engine
        # Sequences decode while later ones prefill, and none may finish before all have started.
        num_output_tokens = num_tokens + -(-batch * context // self.setup.max_num_batched_tokens)
        available = self.setup.max_model_len - context
        assert num_output_tokens <= available, (
            f"{num_output_tokens} tokens after {context} of context exceed limits.max_model_len, "
            f"which leaves {available}"
        )
        prompts = random_prompts(batch, context, vocab_size=vocab_size, seed=batch)
        with self._requests(prompts, [num_output_tokens] * batch, 0.0):
            stats = self.llm.report().scheduling
            before = stats.decode_steps
            while engine.num_waiting or stats.decode_steps == before:
                engine.step()
            yield

    @contextmanager
    def _requests(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> Iterator[None]:
        """Add requests to the engine; abort them on exit."""
        from compiled_llm import SamplingParams
        from compiled_llm.engine.request import Request

        self.llm.reset_prefix_cache()
        requests = [
            Request(
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(
                    temperature=temperature, max_tokens=n, ignore_eos=True
                ),
                max_tokens=n,
            )
            for prompt, n in zip(prompts, output_lengths, strict=True)
        ]
        engine = self.llm.engine
        for request in requests:
            engine.add_request(request)
        try:
            yield
        finally:
            for request in requests:
                engine.abort(request)
            while engine.has_work:
                engine.step()


class OursEager(OursStepped):
    """No compilation and no CUDA graphs, with the same paged KV cache."""

    dispatch = "eager"


class OursTorch(OursStepped):
    """`torch.compile(mode="reduce-overhead")` in its ordinary use."""

    dispatch = "torch"
