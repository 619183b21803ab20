"""vLLM through its offline API.

`compiled_llm` is not imported, because the environment of vLLM may lack it.
"""

import importlib.util
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.systems import GenerateResult, Setup


class VLLM:
    """vLLM with its defaults, except for prefix caching, which is off; see `System`."""

    def __init__(self, **setup: Any) -> None:
        self.setup = Setup(**setup)
        if importlib.util.find_spec("vllm") is None:
            raise ImportError("vllm cannot be imported: install it, or pass --vllm-pythonpath DIR")
        self._llm: Any = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> float:
        began = time.perf_counter()
        from vllm import LLM

        setup = self.setup
        model = setup.config.get("model", {})
        options: dict[str, Any] = (
            {"load_format": "dummy"} if model.get("weights") == "random" else {}
        )
        if setup.memory_share is not None:
            options["gpu_memory_utilization"] = setup.memory_share
        self._llm = LLM(
            model=self._model_path(model.get("name")),
            dtype=setup.dtype,
            max_model_len=setup.max_model_len,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            seed=model.get("seed", 0),
            **options,
        )
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
        return asdict(GenerateResult(counts=counts, seconds=seconds, counters={}))

    def describe(self) -> dict[str, Any]:
        import vllm

        return {"version": vllm.__version__}

    def close(self) -> None:
        self._llm = None
        if self._directory is not None:
            self._directory.cleanup()

    def _model_path(self, name: str | None) -> str:
        """Return the model for vLLM; a config.json is copied to a directory of its own."""
        if name is None:
            raise ValueError(
                "vllm needs model.name, got none: set it to a directory, a hub id or a config.json"
            )
        if not name.endswith(".json"):
            return name
        self._directory = tempfile.TemporaryDirectory()
        shutil.copy(name, Path(self._directory.name) / "config.json")
        return self._directory.name
