"""Our engine, stepped by hand: what a decode step costs, on its own and under the profiler."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.systems.ours import Ours
from bench.trace import Span, launches, spans_of
from bench.workloads import fresh_prompts


class Steps(Ours):
    """`Ours`, with a view into single steps."""

    def decode(
        self, batch: int, context: int, steps: int, rounds: int, vocab_size: int
    ) -> dict[str, Any]:
        """Wall milliseconds and host microseconds of a decode step in each round, the bucket that served them, and padding."""
        step_ms, host_us = [], []
        with self._decoding(batch, context, 2 + steps * (rounds + 1), vocab_size):
            self._run(steps)
            before = self._served()
            for _ in range(rounds):
                seconds, hosted = self._run(steps)
                step_ms.append(seconds / steps * 1e3)
                host_us.append(hosted / steps * 1e6)
            served = {name: count - before.get(name, 0) for name, count in self._served().items()}
        sizes = {bucket.bucket: bucket.size for bucket in self.llm.report().buckets}
        used = max(served, key=lambda name: served[name]) if any(served.values()) else "eager"
        padded = 1 - batch / sizes[used] if used in sizes else 0.0
        return {
            "batch": batch,
            "step_ms": step_ms,
            "host_us": host_us,
            "bucket": used,
            "padded_share": padded,
        }

    def profile(self, batch: int, context: int, steps: int, vocab_size: int) -> dict[str, Any]:
        """Launches, and the spans in which the GPU works, over some decode steps; there are none of them on a CPU."""
        with self._decoding(batch, context, 2 + 2 * steps, vocab_size):
            self._run(2)
            counts, spans = self._profiled(steps)
        return {"steps": steps, "launches": counts, "spans": spans}

    def profile_workload(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float, steps: int
    ) -> dict[str, Any]:
        """Spans of work over steps that prefill and decode, and over steps that only decode, all prompts submitted at once."""
        found = {}
        with self._requests(prompts, output_lengths, temperature):
            engine = self.llm.engine
            for _ in range(min(10, len(prompts))):
                engine.step()
            found["prefill"] = self._profiled(min(steps, 30))[1]
            while engine.num_waiting:
                engine.step()
            self._run(20)
            found["decode"] = self._profiled(steps)[1]
        return found

    def _profiled(self, steps: int) -> tuple[dict[str, int], list[Span]]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            self._run(steps)
        assert profiled.profiler is not None
        events = profiled.profiler.kineto_results.events()
        return launches(event.name() for event in events), spans_of(events)

    def _run(self, steps: int) -> tuple[float, float]:
        """Wall and host seconds of so many steps, the device's work included."""
        stats = self.llm.report().scheduling
        self._wait()
        began, hosted = time.perf_counter(), stats.host_seconds
        for _ in range(steps):
            self.llm.engine.step()
        self._wait()
        return time.perf_counter() - began, stats.host_seconds - hosted

    def _served(self) -> dict[str, int]:
        return {bucket.bucket: bucket.replays for bucket in self.llm.report().buckets}

    def _wait(self) -> None:
        import torch

        if self.llm.model.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _decoding(
        self, batch: int, context: int, num_tokens: int, vocab_size: int
    ) -> Iterator[None]:
        """So many sequences, all of which decode."""
        engine = self.llm.engine
        # A row that has waited for others has decoded meanwhile; none may end before the last has joined.
        room = self.setup.max_model_len - context
        wanted = num_tokens + -(-batch * context // self.setup.max_num_batched_tokens)
        assert wanted <= room, (
            f"{wanted} tokens after {context} of context: limits.max_model_len leaves room for {room}"
        )
        prompts = fresh_prompts(batch, context, vocab_size=vocab_size, seed=batch)
        with self._requests(prompts, [wanted] * batch, 0.0):
            stats = self.llm.report().scheduling
            before = stats.decode_steps
            while engine.num_waiting or stats.decode_steps == before:
                engine.step()
            yield

    @contextmanager
    def _requests(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> Iterator[None]:
        """Requests in the engine, gone afterwards."""
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


class EagerSteps(Steps):
    """No compiler and no graphs, on the same paged cache."""

    dispatch = "eager"


class TorchSteps(Steps):
    """`torch.compile(mode="reduce-overhead")` called as anyone would call it."""

    dispatch = "torch"
