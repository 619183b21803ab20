"""Several systems, each in a worker process: started one after another, then called in turns."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.roofline import Roofline
from bench.systems import SYSTEMS, GenerateResult, Setup
from bench.worker_client import WorkerClient, WorkerError
from compiled_llm.config.schema import Config

_GPU_SHARE = 0.9  # of the GPU's memory, divided among the systems that run


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Options of all worker processes.

    Attributes:
        timeout: seconds that one call may take.
        vllm_pythonpath: directory that precedes all others in the search path of vLLM's process.
    """

    timeout: float = 3600.0
    vllm_pythonpath: str | None = None


@dataclass(slots=True, kw_only=True)
class WorkerGroup:
    """Running systems, and the failures of the others; all mappings are keyed by system.

    Attributes:
        clients: running systems.
        ready_seconds: seconds that `System.start` took.
        descriptions: results of `System.describe`.
        failures: latest error of a system.
    """

    clients: dict[str, WorkerClient] = field(default_factory=dict)
    ready_seconds: dict[str, float] = field(default_factory=dict)
    descriptions: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def start(
        self, name: str, setup: Setup, options: WorkerOptions, *, target: str | None = None
    ) -> None:
        """Start a system; record the failure if it cannot start."""
        print(f"starting {name} ...", file=sys.stderr)
        try:
            client = open_worker(name, setup, options, target=target)
        except WorkerError as error:
            self._record_failure(name, str(error))
            return
        self.clients[name] = client
        seconds = self.call(name, "start")
        description = self.call(name, "describe") if seconds is not None else None
        if seconds is None or description is None:
            self.stop(name)
            return
        self.ready_seconds[name] = seconds
        self.descriptions[name] = description

    def call(self, name: str, method: str, **arguments: Any) -> Any:
        """Call a method of a running system; return its result, or None if it failed.

        The failure is recorded, and the system is stopped if its process has ended.
        """
        try:
            return self.clients[name].call(method, **arguments)
        except WorkerError as error:
            self._record_failure(name, str(error))
            if not error.alive:
                self.stop(name)
            return None

    def generate(
        self, name: str, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> GenerateResult | None:
        """Call `System.generate`; return None if it failed or returned other output lengths."""
        lengths = {"prompts": prompts, "output_lengths": output_lengths}
        response = self.call(name, "generate", **lengths, temperature=temperature)
        if response is None:
            return None
        result = GenerateResult(**response)
        if result.counts != output_lengths:
            expected, got = sum(output_lengths), sum(result.counts)
            self._record_failure(name, f"expected {expected} output tokens, got {got}")
            return None
        return result

    def describe(self) -> dict[str, Any]:
        """Return the record's facts about all systems; print the reasons for eager steps."""
        reports: dict[str, dict[str, Any]] = {}
        for name in [name for name in self.clients if name.startswith("ours")]:
            report = self.call(name, "report")
            if report is not None:
                reports[name] = report
                for reason, steps in report["fallbacks"].items():
                    print(f"{name}: {steps} steps ran eagerly: {reason}", file=sys.stderr)
        return {
            "systems": self.descriptions,
            "ready_seconds": self.ready_seconds,
            "failures": self.failures,
            "reports": reports,
        }

    def stop(self, name: str) -> None:
        """End a system's process."""
        client = self.clients.pop(name, None)
        if client is not None:
            client.close()

    def close(self) -> None:
        """End all processes."""
        for name in list(self.clients):
            self.stop(name)

    def _record_failure(self, name: str, reason: str) -> None:
        self.failures[name] = reason
        print(f"{name}: {reason}", file=sys.stderr)


@contextmanager
def start_workers(
    names: list[str], config: Config, roofline: Roofline, options: WorkerOptions
) -> Iterator[WorkerGroup]:
    """Start systems, yield them and close them; on a GPU they get equal shares of its memory."""
    workers = WorkerGroup()
    shared = roofline.device == "cuda" and len(names) > 1
    share = _GPU_SHARE / len(names) if shared else None
    try:
        for number, name in enumerate(names):
            before = number * (share or 0.0)
            workers.start(name, make_setup(config, roofline, share=share, before=before), options)
        yield workers
    finally:
        workers.close()


def make_setup(
    config: Config, roofline: Roofline, *, share: float | None = None, before: float = 0.0
) -> Setup:
    """Return the setup of a system; `share` and `before` are its memory share and offset."""
    return Setup(
        config=config.model_dump(mode="json"),
        dtype=roofline.dtype,
        device=roofline.device,
        max_num_seqs=roofline.max_num_seqs,
        max_num_batched_tokens=roofline.max_num_batched_tokens,
        max_model_len=roofline.max_model_len,
        memory_share=share,
        memory_before=before,
    )


def open_worker(
    name: str,
    setup: Setup,
    options: WorkerOptions,
    *,
    target: str | None = None,
    env: Mapping[str, str] | None = None,
) -> WorkerClient:
    """Return a process that holds the system, not started.

    Args:
        target: `module:Class` of the system; that of `name` if None.

    Raises:
        WorkerError: the system's constructor failed.
    """
    return WorkerClient(
        target or SYSTEMS[name],
        asdict(setup),
        pythonpath=options.vllm_pythonpath if name == "vllm" else None,
        env=env,
        timeout=options.timeout,
    )


def probe_roofline(config: Config, options: WorkerOptions) -> Roofline:
    """Measure the roofline in a worker process, which frees the device's memory by ending.

    Raises:
        ValueError: the config's model or device cannot be used.
    """
    try:
        with WorkerClient("bench.roofline:RooflineProbe", {}, timeout=options.timeout) as worker:
            return Roofline(**worker.call("measure", config=config.model_dump(mode="json")))
    except WorkerError as error:
        raise ValueError(f"the roofline could not be measured: {error}") from None
