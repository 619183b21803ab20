"""transformers' continuous batching, through the manager, which supports per-request lengths."""

import time
from dataclasses import asdict
from typing import Any

from bench.systems import GenerateResult, Setup
from bench.systems.transformers_generate import TransformersEager, sampling_options

_BLOCK = 256  # tokens of a KV cache block


class TransformersBatching(TransformersEager):
    """A continuous batching manager, recreated when the temperature changes; see `System`."""

    def __init__(self, **setup: Any) -> None:
        super().__init__(**setup)
        self._manager: Any = None
        self._temperature: float | None = None

    def start(self) -> float:
        began = time.perf_counter()
        super().start()
        self._ensure_manager(0.0)
        return time.perf_counter() - began

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        self._ensure_manager(temperature)
        began = time.perf_counter()
        ids = [
            self._manager.add_request(list(prompt), max_new_tokens=n, eos_token_id=-1)
            for prompt, n in zip(prompts, output_lengths, strict=True)
        ]
        counts: dict[str, int] = {}
        while len(counts) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                counts[result.request_id] = len(result.generated_tokens)
            elif result is None and not self._manager.is_running():
                raise RuntimeError("the generation thread of transformers ended early")
        return asdict(
            GenerateResult(
                counts=[counts[name] for name in ids],
                seconds=time.perf_counter() - began,
                counters={},
            )
        )

    def close(self) -> None:
        self._stop_manager()
        super().close()

    def _stop_manager(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=5)
            self._manager.destroy()
        self._manager = None

    def _ensure_manager(self, temperature: float) -> None:
        if self._manager is not None and self._temperature == temperature:
            return
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._stop_manager()
        generation_config = GenerationConfig(
            eos_token_id=-1, pad_token_id=0, **sampling_options(temperature)
        )
        self._manager = self._model.init_continuous_batching(
            generation_config=generation_config,
            continuous_batching_config=ContinuousBatchingConfig(
                block_size=_BLOCK,
                num_blocks=self._num_blocks(),
                max_batch_tokens=self.setup.max_num_batched_tokens,
                max_requests_per_batch=self.setup.max_num_seqs,
                allow_block_sharing=False,
            ),
        )
        self._manager.warmup()
        self._manager.start()
        self._temperature = temperature

    def _num_blocks(self) -> int:
        """Return the blocks that all sequences need, limited by this system's share of memory."""
        import torch

        setup: Setup = self.setup
        needed = setup.max_num_seqs * -(-setup.max_model_len // _BLOCK)
        if setup.device != "cuda":
            return needed
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        block = _BLOCK * config.num_hidden_layers * 2 * heads * dim * self._model.dtype.itemsize
        free, total = torch.cuda.mem_get_info()
        share = setup.memory_share or 0.9
        budget = min(0.8 * free, share * total - torch.cuda.memory_allocated())
        return max(1, min(needed, int(0.8 * budget / block)))
