"""Soak test of three engines in one process; each output is compared with that of a lone request.

    python -m tests.faults.soak [--minutes 10] [--seed 0]

Two asynchronous engines serve random requests that share prompts, are preempted and are aborted,
while they compile and capture their buckets lazily; both are closed and restarted repeatedly. At
the same time a synchronous engine is interrupted, as by Ctrl-C, at random moments. The exit status
is 1 at the first wrong token, lost block or request that does not end.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import PreTrainedModel

from compiled_llm import AsyncCompiledLLM, CompiledLLM
from compiled_llm.config.schema import Config
from tests.helpers.arrivals import Case, random_cases, run_alone
from tests.helpers.tiny_models import small_config, tiny_model

FAMILIES = ("llama", "qwen3")
NUM_CASES = 60
ROUNDS_A_LIFE = 12  # of an asynchronous engine
PATIENCE = 300.0  # seconds until a request without an end is a failure
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 128}


@dataclass(slots=True)
class Soak:
    """Deadline, counters and failures, shared by all threads."""

    deadline: float
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return bool(self.failures) or time.monotonic() > self.deadline

    def check(self, holds: bool, message: str) -> None:
        if not holds:
            self.failures.append(message)


def lazy_config() -> Config:
    """Return a config whose cache is too small for all rows, so that requests are preempted."""
    return small_config(
        limits=LIMITS,
        cache={"memory": 20 * 16 * 2 * 2 * 2 * 32 * 4},
        compile={"capture": "lazy"},
        buckets={"decode": [2], "prefill": [16], "samplers": ["greedy", "full"]},
    )


def alone(model: PreTrainedModel, cases: list[Case]) -> list[tuple[list[int], str | None]]:
    """Return what each request generates alone, eagerly."""
    with CompiledLLM(
        model, None, small_config(limits=LIMITS, compile={"dispatch": "eager"}), progress=False
    ) as llm:
        requests = [run_alone(llm, case) for case in cases]
    return [(request.token_ids, request.finish_reason) for request in requests]


async def serve(
    soak: Soak,
    name: str,
    model: PreTrainedModel,
    cases: list[Case],
    want: list[tuple[list[int], str | None]],
    seed: int,
) -> None:
    """Start an asynchronous engine repeatedly, and serve random requests."""
    rng = random.Random(seed)
    while not soak.over:
        llm = await asyncio.to_thread(
            AsyncCompiledLLM, lambda: CompiledLLM(model, None, lazy_config(), progress=False)
        )
        free = await llm.call(lambda engine: engine.engine.cache.num_free_blocks)
        for _ in range(ROUNDS_A_LIFE):
            if soak.over:
                break
            numbers = rng.sample(range(len(cases)), 20)
            tasks = [
                one(soak, name, llm, cases[number], want[number], rng.random())
                for number in numbers
            ]
            await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
            await llm.call(lambda engine: engine.engine.cache.check())
            now = await llm.call(lambda engine: engine.engine.cache.num_free_blocks)
            soak.check(now == free, f"{name}: {now} pages are free, expected {free}")
            soak.counts[f"{name} rounds"] += 1
        report = await llm.report()
        soak.counts[f"{name} captures"] += sum(
            bucket.state in ("graph", "compiled") for bucket in report.buckets
        )
        soak.counts[f"{name} preemptions"] += report.scheduling.preemptions
        await asyncio.to_thread(llm.close)


async def one(
    soak: Soak,
    name: str,
    llm: AsyncCompiledLLM,
    case: Case,
    want: tuple[list[int], str | None],
    chance: float,
) -> None:
    """Run one request after a random delay; abort one in five."""
    await asyncio.sleep(0.2 * chance)
    stream = await llm.add_request(case.prompt, case.params, streaming=chance < 0.5)
    if chance % 0.1 < 0.02:
        with suppress(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.05 * chance)
        stream.close()
        soak.counts[f"{name} aborted"] += 1
        return
    *_, last = [output async for output in stream]
    done = last.outputs[0]
    soak.check(
        (done.token_ids, done.finish_reason) == want, f"{name}: {case} gave {done}, alone {want}"
    )
    soak.counts[f"{name} requests"] += 1


def interrupt(
    soak: Soak,
    model: PreTrainedModel,
    cases: list[Case],
    want: list[tuple[list[int], str | None]],
    seed: int,
) -> None:
    """Alternate interrupted and complete calls, in the main thread, which receives signals."""
    rng = random.Random(seed)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    with CompiledLLM(
        model, None, small_config(limits=LIMITS, compile={"dispatch": "eager"}), progress=False
    ) as llm:
        free, seconds = llm.engine.cache.num_free_blocks, 1.0
        while not soak.over:
            numbers = rng.sample(range(len(cases)), 6)
            began = time.monotonic()
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, seconds))
                generate(llm, [cases[number] for number in numbers])
            except KeyboardInterrupt:
                soak.counts["interrupts"] += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            found = generate(llm, [cases[number] for number in numbers])
            seconds = 0.9 * (time.monotonic() - began)
            soak.check(
                found == [want[number] for number in numbers],
                f"after an interrupt: {numbers} gave {found}",
            )
            llm.engine.cache.check()
            soak.check(
                llm.engine.cache.num_free_blocks == free, "after an interrupt, pages are not free"
            )
            soak.counts["calls"] += 1


def generate(llm: CompiledLLM, cases: list[Case]) -> list[tuple[list[int], str | None]]:
    outputs = llm.generate(
        [case.prompt for case in cases], [case.params for case in cases], progress=False
    )
    return [(output.outputs[0].token_ids, output.outputs[0].finish_reason) for output in outputs]


def guarded(soak: Soak, name: str, work: Callable[[], None]) -> None:
    """Run a thread's work, and record an exception as a failure."""
    try:
        work()
    except BaseException as error:
        soak.failures.append(f"{name}: {type(error).__name__}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Random requests, aborts, interrupts and captures on three engines at once."
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    soak = Soak(deadline=time.monotonic() + 60 * options.minutes)
    cases = random_cases(NUM_CASES, longest=90, max_tokens=30, seed=options.seed)
    models = [tiny_model(family) for family in FAMILIES]
    wanted = [alone(model, cases) for model in models]
    threads = []
    for number, (family, model, want) in enumerate(zip(FAMILIES, models, wanted, strict=True)):

        def work(
            family: str = family,
            model: PreTrainedModel = model,
            want: list[tuple[list[int], str | None]] = want,
            seed: int = options.seed + 1 + number,
        ) -> None:
            asyncio.run(serve(soak, family, model, cases, want, seed))

        threads.append(threading.Thread(target=guarded, args=(soak, family, work), daemon=True))
    for thread in threads:
        thread.start()
    sync_model = tiny_model(FAMILIES[0])
    guarded(
        soak, "interrupted", lambda: interrupt(soak, sync_model, cases, wanted[0], options.seed)
    )
    for thread in threads:
        thread.join(PATIENCE)
        soak.check(not thread.is_alive(), f"{thread.name} hangs")
    print(", ".join(f"{count} {what}" for what, count in sorted(soak.counts.items())))
    for failure in soak.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if soak.failures else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
