"""compiled_llm through its public API."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bench.systems import GenerateResult, Setup

if TYPE_CHECKING:
    from compiled_llm import CompiledLLM

_MAX_GPU_SHARE = 0.95


class Ours:
    """`CompiledLLM` with the config as given; see `System` for the methods.

    Attributes:
        dispatch: replaces the config's `compile.dispatch` unless None.
    """

    dispatch: str | None = None

    def __init__(self, **setup: Any) -> None:
        self.setup = Setup(**setup)
        self._llm: CompiledLLM | None = None
        self._import_seconds = 0.0

    @property
    def llm(self) -> "CompiledLLM":
        assert self._llm is not None, "start() has not been called"
        return self._llm

    def start(self) -> float:
        began = time.perf_counter()
        from compiled_llm import CompiledLLM
        from compiled_llm.config.loader import parse_config

        self._import_seconds = time.perf_counter() - began
        self._llm = CompiledLLM.from_pretrained(config=parse_config(self._config_values()))
        return time.perf_counter() - began

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        from compiled_llm import SamplingParams

        params = [
            SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True)
            for n in output_lengths
        ]
        self.llm.reset_prefix_cache()
        before = self._counters()
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, params, progress=False)
        seconds = time.perf_counter() - began
        counters = {name: value - before[name] for name, value in self._counters().items()}
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        return asdict(GenerateResult(counts=counts, seconds=seconds, counters=counters))

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import PackageNotFoundError, version

        try:
            ours = version("compiled-llm")
        except PackageNotFoundError:
            ours = "from source"
        return {
            "version": ours,
            "dispatch": self.llm.config.compile.dispatch,
            "passes": self.llm.config.pass_order(),
        }

    def report(self) -> dict[str, Any]:
        """Return the engine's report, with the seconds that importing the package took."""
        return {**self.llm.report().to_dict(), "import_seconds": self._import_seconds}

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase of the startup; `prepare` sums up unnamed phases."""
        phases = {phase.name: phase.seconds for phase in self.llm.report().phases}
        phases["import"] = self._import_seconds
        named = {"load": ["load weights"], "compile": ["compile", "load compiled", "autotune"]}
        named |= {name: [name] for name in ("import", "trace", "capture")}
        rest = phases.keys() - {name for names in named.values() for name in names}
        return {
            "prepare": sum(phases[name] for name in rest),
            **{part: sum(phases.get(name, 0.0) for name in names) for part, names in named.items()},
        }

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()

    def _config_values(self) -> dict[str, Any]:
        setup = self.setup
        values = {**setup.config}
        if setup.memory_share is not None:
            # gpu_memory_utilization includes the memory that other processes hold.
            share = min(_MAX_GPU_SHARE, setup.memory_before + setup.memory_share)
            values["cache"] = {**values.get("cache", {}), "gpu_memory_utilization": share}
        if self.dispatch is not None:
            values["compile"] = {**values.get("compile", {}), "dispatch": self.dispatch}
            values["strict"] = False
        return values

    def _counters(self) -> dict[str, float]:
        report = self.llm.report()
        stats = report.scheduling
        return {
            "steps": stats.steps,
            "host_seconds": stats.host_seconds,
            "padded": sum(bucket.padded for bucket in report.buckets),
            "computed": sum(bucket.replays * bucket.size for bucket in report.buckets),
            "preemptions": stats.preemptions,
            "fallbacks": sum(report.fallbacks.values()),
        }
