"""A tiny model on the CPU, and systems in this process instead of worker processes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from bench.roofline import Roofline
from bench.run import BenchRun
from bench.systems import Setup
from bench.systems.ours_stepped import OursStepped
from bench.worker_client import WorkerError
from bench.worker_group import WorkerOptions
from compiled_llm.config.loader import parse_config
from compiled_llm.config.schema import Config

_ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def write_architecture(directory: Path, **changes: Any) -> Path:
    """Write the config.json of a model with two layers and return its path."""
    path = directory / "tiny.json"
    path.write_text(json.dumps(_ARCHITECTURE | changes))
    return path


def tiny_config(directory: Path, **changes: Any) -> Config:
    """Return an eager config with 4 sequences, 64 tokens per step and 128 per sequence."""
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


def fake_roofline(**changes: Any) -> Roofline:
    """Return a roofline with round numbers."""
    values: dict[str, Any] = {
        "model": "Tiny",
        "device": "cpu",
        "device_name": "a CPU",
        "dtype": "float32",
        "vocab_size": 160,
        "parameters": 1000,
        "weight_bytes": 4000,
        "kv_bytes": 16,
        "copy_bandwidth": 2e6,
        "read_bandwidth": 1e6,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
    }
    return Roofline(**(values | changes))


def local_run(config: Config, **changes: Any) -> BenchRun:
    """Return a run with the config and a fake roofline, whose results go nowhere."""
    roofline = fake_roofline(**changes)
    out = Path("/nonexistent")
    return BenchRun(config=config, roofline=roofline, options=WorkerOptions(), out=out)


class LocalClient:
    """A `bench.worker_client.WorkerClient` without a process; values still pass through JSON."""

    def __init__(self, system: Any) -> None:
        self.system = system

    def call(self, method: str, **arguments: Any) -> Any:
        try:
            result = getattr(self.system, method)(**json.loads(json.dumps(arguments)))
            return json.loads(json.dumps(result))
        except Exception as error:
            raise WorkerError(f"{type(error).__name__}: {error}", alive=True) from error

    def close(self) -> None:
        self.system.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_local(name: str, setup: Setup, options: object, **_: object) -> LocalClient:
    """Replace `bench.worker_group.open_worker`."""
    return LocalClient(OursStepped(**asdict(setup)))
