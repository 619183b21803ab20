"""transformers' `generate`, eager, or with a static cache and a compiled decode step.

`generate` batches statically: prompts are padded on the left, and a batch runs until its longest
output is complete. Requests are sorted by length, which wastes the least work; only requested
tokens are counted.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bench.systems import GenerateResult, Setup


class TransformersEager:
    """`generate` with its defaults; see `System`."""

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
        self._model.generation_config.eos_token_id = None  # outputs have fixed lengths
        return time.perf_counter() - began

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        import torch

        counts = [0] * len(prompts)
        self._synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            for batch in self._batches(prompts, output_lengths):
                longest = max(output_lengths[number] for number in batch)
                generated = self._complete(
                    [prompts[number] for number in batch], longest, temperature
                )
                for number in batch:
                    counts[number] = min(generated, output_lengths[number])
        self._synchronize()
        return asdict(
            GenerateResult(counts=counts, seconds=time.perf_counter() - began, counters={})
        )

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "version": transformers.__version__,
            "attention": self._model.config._attn_implementation,
        }

    def close(self) -> None:
        self._model = None

    def _generate_options(self) -> dict[str, Any]:
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
        """Generate `num_tokens` for each prompt of a batch; return the number generated."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor(
            [[0] * (longest - len(prompt)) + prompt for prompt in prompts],
            device=self._model.device,
        )
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts],
            device=self._model.device,
        )
        output = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **sampling_options(temperature),
            **self._generate_options(),
        )
        return int(output.shape[1]) - longest

    def _synchronize(self) -> None:
        import torch

        if self._model.device.type == "cuda":
            torch.cuda.synchronize()


class TransformersCompile(TransformersEager):
    """A static cache and transformers' compiled decode step (`reduce-overhead` on a GPU)."""

    def _generate_options(self) -> dict[str, Any]:
        from transformers import CompileConfig

        compile_config: Any = CompileConfig()
        if self.setup.device == "cpu":
            compile_config = CompileConfig(mode="default")
            # By default, transformers compiles on accelerators only.
            compile_config._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": compile_config}


def sampling_options(temperature: float) -> dict[str, Any]:
    """Return the options of a transformers GenerationConfig for a temperature; 0 is greedy."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
