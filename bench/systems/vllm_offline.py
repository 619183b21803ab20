"""vLLM's offline API. Nothing of `compiled_llm` is imported: vLLM may live in an environment without it."""

import importlib.util
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.systems import Generated, Setup


class Vllm:
    """vLLM with its defaults, without prefix caching; random weights where the config says so. See `System`."""

    def __init__(self, **setup: Any) -> None:
        self.setup = Setup(**setup)
        if importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "vllm is not importable here: install it, or pass --vllm-pythonpath DIR"
            )
        self._llm: Any = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> float:
        began = time.perf_counter()
        from vllm import LLM

        setup, model = self.setup, self.setup.config.get("model", {})
        options: dict[str, Any] = (
            {"load_format": "dummy"} if model.get("weights") == "random" else {}
        )
        if setup.memory_share is not None:
            options["gpu_memory_utilization"] = setup.memory_share
        self._llm = LLM(
            model=self._model(model.get("name")), dtype=setup.dtype, max_model_len=setup.max_model_len, skip_tokenizer_init=True,
            enable_prefix_caching=False, seed=model.get("seed", 0), **options,
        )  # fmt: skip
        return time.perf_counter() - began

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in output_lengths
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        began = time.perf_counter()
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        return asdict(Generated(counts=counts, seconds=seconds, counters={}))

    def describe(self) -> dict[str, Any]:
        import vllm

        return {"version": vllm.__version__}

    def close(self) -> None:
        self._llm = None
        if self._directory is not None:
            self._directory.cleanup()

    def _model(self, name: str | None) -> str:
        """A path for vLLM; a bare config.json gets a directory of its own."""
        if name is None:
            raise ValueError("vllm needs a model.name: a directory, a hub id or a config.json")
        if not name.endswith(".json"):
            return name
        self._directory = tempfile.TemporaryDirectory()
        shutil.copy(name, Path(self._directory.name) / "config.json")
        return self._directory.name
