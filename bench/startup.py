"""`bench startup`: from a fresh process to the first token, with empty compiler caches and with what that run left in them."""

import tempfile
import time
from pathlib import Path
from typing import Any

from bench.roofline import Roofline
from bench.worker_client import WorkerError
from bench.worker_group import Options, open_worker, setup_of
from bench.workloads import fresh_prompts
from compiled_llm.config.schema import Config
from compiled_llm.models.default_model import default_model

PHASES = [
    "process",
    "import",
    "load",
    "prepare",
    "trace",
    "compile",
    "capture",
    "other",
    "first token",
]
_CACHES = {
    "COMPILED_LLM_CACHE": "compiled_llm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
}


def run(
    names: list[str], config: Config, card: Roofline, options: Options, *, context: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each system, cold and warm, and round; each round begins with caches that are empty."""
    if (
        config.model.name is None and config.model.weights == "auto"
    ):  # downloaded to a cache, but no part of a start
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"name": str(default_model())})}
        )
    rows = []
    for number in range(rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as directory:
                env = {
                    variable: str(Path(directory, folder)) for variable, folder in _CACHES.items()
                }
                for caches in ("cold", "warm"):
                    row: dict[str, Any] = {"system": name, "caches": caches, "round": number + 1}
                    try:
                        row |= _start(name, config, card, options, env, context)
                    except WorkerError as error:
                        row["failure"] = str(error)
                    rows.append(row)
    return rows


def _start(
    name: str, config: Config, card: Roofline, options: Options, env: dict[str, str], context: int
) -> dict[str, Any]:
    """Seconds of one start; `other` is what no phase accounts for."""
    prompts = fresh_prompts(1, context, vocab_size=card.vocab_size, seed=0)
    began = time.perf_counter()
    with open_worker(name, setup_of(config, card), options, env=env) as worker:
        made = time.perf_counter() - began
        ready = worker.call("start")
        first = worker.call("generate", prompts=prompts, output_lengths=[1], temperature=0.0)[
            "seconds"
        ]
        total = time.perf_counter() - began
        phases: dict[str, float] = worker.call("phases") if name.startswith("ours") else {}
    known = {"process": made, **phases, "first token": first}
    return {"total": total, **known, "other": max(0.0, total - sum(known.values())), "ready": ready}
