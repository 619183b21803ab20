"""Several systems at once, each in its process: started one after another, then asked in turns."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bench.roofline import Roofline
from bench.systems import SYSTEMS, Generated, Setup
from bench.worker_client import WorkerClient, WorkerError
from compiled_llm.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What all commands share.

    Attributes:
        limit: seconds that one call may take.
        vllm_pythonpath: searched first in vLLM's process alone.
    """

    limit: float = 3600.0
    vllm_pythonpath: str | None = None


@dataclass(slots=True, kw_only=True)
class WorkerGroup:
    """The systems that run, and why the others do not.

    Attributes:
        ready_seconds, described: of each system that started.
        failures: why a system is not there (any more), by its name.
    """

    workers: dict[str, WorkerClient] = field(default_factory=dict)
    ready_seconds: dict[str, float] = field(default_factory=dict)
    described: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def start(
        self, name: str, setup: Setup, options: Options, *, target: str | None = None
    ) -> None:
        """Start a system; where it cannot, that is noted."""
        print(f"starting {name} ...", file=sys.stderr)
        try:
            worker = open_worker(name, setup, options, target=target)
        except WorkerError as error:
            self._lose(name, error)
            return
        self.workers[name] = worker
        seconds = self.call(name, "start")
        described = self.call(name, "describe") if seconds is not None else None
        if seconds is None or described is None:
            self.drop(name)
            return
        self.ready_seconds[name], self.described[name] = seconds, described

    def call(self, name: str, method: str, **arguments: Any) -> Any:
        """What the system answers, or None: it failed, and `failures` says why. A dead one is dropped."""
        try:
            return self.workers[name].call(method, **arguments)
        except WorkerError as error:
            self._lose(name, error)
            if not error.alive:
                self.drop(name)
            return None

    def generate(
        self, name: str, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> Generated | None:
        """As `System.generate`; None where it failed or gave other lengths than asked for."""
        answer = self.call(
            name,
            "generate",
            prompts=prompts,
            output_lengths=output_lengths,
            temperature=temperature,
        )
        if answer is None:
            return None
        generated = Generated(**answer)
        if generated.counts != output_lengths:
            self._lose(
                name,
                WorkerError(
                    f"{sum(generated.counts)} tokens came, {sum(output_lengths)} were asked for",
                    alive=True,
                ),
            )
            return None
        return generated

    def drop(self, name: str) -> None:
        """End a system's process."""
        worker = self.workers.pop(name, None)
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """End all processes."""
        for name in list(self.workers):
            self.drop(name)

    def _lose(self, name: str, error: WorkerError) -> None:
        self.failures[name] = str(error)
        print(f"{name}: {error}", file=sys.stderr)


@contextmanager
def started(
    names: list[str], config: Config, card: Roofline, options: Options
) -> Iterator[WorkerGroup]:
    """A session with these systems; on a GPU they share its memory in equal parts."""
    session = WorkerGroup()
    shared = card.device == "cuda" and len(names) > 1
    share = 0.9 / len(names) if shared else None
    try:
        for number, name in enumerate(names):
            session.start(
                name, setup_of(config, card, share=share, before=number * (share or 0.0)), options
            )
        yield session
    finally:
        session.close()


def fitted(config: Config, card: Roofline, longest: int) -> tuple[Config, Roofline]:
    """Both with room for sequences of `longest` tokens; says so where a limit had to be raised for that."""
    if longest <= card.max_model_len:
        return config, card
    print(
        f"limits.max_model_len is {card.max_model_len}, raised to {longest} for this benchmark",
        file=sys.stderr,
    )
    limits = config.limits.model_copy(update={"max_model_len": longest})
    return config.model_copy(update={"limits": limits}), replace(card, max_model_len=longest)


def setup_of(
    config: Config, card: Roofline, *, share: float | None = None, before: float = 0.0
) -> Setup:
    """What a system is told."""
    return Setup(
        config=config.model_dump(mode="json"),
        dtype=card.dtype,
        device=card.device,
        max_num_seqs=card.max_num_seqs,
        max_num_batched_tokens=card.max_num_batched_tokens,
        max_model_len=card.max_model_len,
        memory_share=share,
        memory_before=before,
    )


def open_worker(
    name: str,
    setup: Setup,
    options: Options,
    *,
    target: str | None = None,
    env: Mapping[str, str] | None = None,
) -> WorkerClient:
    """A process with the system, not started; raises WorkerError."""
    pythonpath = options.vllm_pythonpath if name == "vllm" else None
    return WorkerClient(
        target or SYSTEMS[name], asdict(setup), pythonpath=pythonpath, env=env, limit=options.limit
    )


def measured_card(config: Config, options: Options) -> Roofline:
    """The card, from a process that has ended since; raises ValueError where the config cannot be served."""
    try:
        with WorkerClient("bench.roofline:RooflineProbe", {}, limit=options.limit) as worker:
            return Roofline(**worker.call("measure", config=config.model_dump(mode="json")))
    except WorkerError as error:
        raise ValueError(f"the card could not be made: {error}") from None
