"""transformers' own `generate`: eager with its default cache, or with a static cache and a compiled decode step.

It batches statically: prompts are padded on the left, and a batch runs until its longest output is done. Requests are sorted by
their lengths, which is the best that such batches can do; only the tokens asked for are counted.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bench.systems import Generated, Setup


class TransformersEager:
    """`generate` as it comes; see `System`."""

    def __init__(self, **setup: Any) -> None:
        self.setup = Setup(**setup)
        self._model: Any = None

    def start(self) -> float:
        began = time.perf_counter()
        from compiled_llm.config.schema import ModelConfig
        from compiled_llm.models.loading import load

        values = {
            **self.setup.config.get("model", {}),
            "dtype": self.setup.dtype,
            "device": self.setup.device,
        }
        self._model = load(ModelConfig.model_validate(values)).model
        self._model.generation_config.eos_token_id = None  # outputs have the lengths asked for
        return time.perf_counter() - began

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        import torch

        counts = [0] * len(prompts)
        self._wait()
        began = time.perf_counter()
        with torch.no_grad():
            for batch in self._batches(prompts, output_lengths):
                longest = max(output_lengths[number] for number in batch)
                generated = self._complete(
                    [prompts[number] for number in batch], longest, temperature
                )
                for number in batch:
                    counts[number] = min(generated, output_lengths[number])
        self._wait()
        return asdict(Generated(counts=counts, seconds=time.perf_counter() - began, counters={}))

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "version": transformers.__version__,
            "attention": self._model.config._attn_implementation,
        }

    def close(self) -> None:
        self._model = None

    def _options(self) -> dict[str, Any]:
        return {}

    def _batches(self, prompts: list[list[int]], output_lengths: list[int]) -> Iterator[list[int]]:
        size = self.setup.max_num_seqs
        order = sorted(
            range(len(prompts)),
            key=lambda number: (output_lengths[number], len(prompts[number])),
            reverse=True,
        )
        return (order[begin : begin + size] for begin in range(0, len(order), size))

    def _complete(self, prompts: list[list[int]], num_tokens: int, temperature: float) -> int:
        """Generate `num_tokens` for one batch; returns how many came."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor(
            [[0] * (longest - len(prompt)) + prompt for prompt in prompts],
            device=self._model.device,
        )
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._model.device
        )
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        output = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **sampling,
            **self._options(),
        )
        return int(output.shape[1]) - longest

    def _wait(self) -> None:
        import torch

        if self._model.device.type == "cuda":
            torch.cuda.synchronize()


class TransformersCompile(TransformersEager):
    """A static cache, and the decode step compiled as transformers compiles it (`reduce-overhead` on a GPU)."""

    def _options(self) -> dict[str, Any]:
        from transformers import CompileConfig

        compile_config: Any = CompileConfig()
        if self.setup.device == "cpu":
            compile_config = CompileConfig(mode="default")
            compile_config._compile_all_devices = (
                True  # by itself, it compiles on accelerators alone
            )
        return {"cache_implementation": "static", "compile_config": compile_config}
