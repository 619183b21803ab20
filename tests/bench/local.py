"""A tiny model on the CPU, and systems in this process instead of one of their own."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.roofline import Roofline
from bench.systems import Setup
from bench.worker_client import WorkerError
from compiled_llm.config.loader import parse_config
from compiled_llm.config.schema import Config

_ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def write_architecture(directory: Path, **changes: Any) -> Path:
    """A config.json of two layers."""
    path = directory / "tiny.json"
    path.write_text(json.dumps(_ARCHITECTURE | changes))
    return path


def tiny_config(directory: Path, **changes: Any) -> Config:
    """Uncompiled, on the CPU: 4 sequences, 64 tokens a step, 128 a sequence."""
    model = {
        "name": str(write_architecture(directory)),
        "weights": "random",
        "device": "cpu",
        "dtype": "float32",
    }
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128}
    return parse_config(
        {"model": model, "limits": limits, "compile": {"dispatch": "eager"}, **changes}
    )


def made_up_card(**changes: Any) -> Roofline:
    """A card of nothing that exists."""
    values: dict[str, Any] = {
        "model": "Tiny", "device": "cpu", "device_name": "a CPU", "dtype": "float32", "vocab_size": 160, "parameters": 1000,
        "weight_bytes": 4000, "kv_bytes": 16, "copy_bandwidth": 2e6, "read_bandwidth": 1e6, "max_num_seqs": 4,
        "max_num_batched_tokens": 64, "max_model_len": 128,
    }  # fmt: skip
    return Roofline(**(values | changes))


class Local:
    """As `bench.worker_client.WorkerClient`, without a process: values still pass through JSON."""

    def __init__(self, system: Any) -> None:
        self.system = system

    def call(self, method: str, **arguments: Any) -> Any:
        try:
            return json.loads(
                json.dumps(getattr(self.system, method)(**json.loads(json.dumps(arguments))))
            )
        except Exception as error:
            raise WorkerError(f"{type(error).__name__}: {error}", alive=True) from error

    def close(self) -> None:
        self.system.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_local(name: str, setup: Setup, options: object, **_: object) -> Local:
    """In place of `bench.worker_group.open_worker`."""
    from dataclasses import asdict

    from bench.systems.ours_steps import Steps

    return Local(Steps(**asdict(setup)))
