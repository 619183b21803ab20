"""`bench startup`: seconds from a fresh process to the first token.

Each system starts twice in a round: with empty compiler caches, then with the caches which that
start has filled.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.display import Column, number
from bench.figures import bars
from bench.run import BenchRun, CommandResult
from bench.worker_client import WorkerError
from bench.worker_group import make_setup, open_worker
from bench.workloads import random_prompts
from compiled_llm.config.schema import Config
from compiled_llm.models.default_model import default_model

PHASES = (
    "process",
    "import",
    "load",
    "prepare",
    "trace",
    "compile",
    "capture",
    "other",
    "first token",
)
_CACHES = {
    "COMPILED_LLM_CACHE": "compiled_llm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
}
_COLUMNS = (
    Column("system", "system"),
    Column("caches", "caches"),
    Column("round", "round"),
    Column("s to first token", "total", number(2)),
    *(Column(name, name, number(2)) for name in PHASES),
)


def run(bench: BenchRun, names: list[str], *, context: int, rounds: int) -> None:
    """Run the command with a prompt of `context` tokens."""
    bench.reserve(context + 1)
    rows = measure(bench, names, context=context, rounds=rounds)
    labelled = [{**row, "label": f"{row['system']}, {row['caches']}"} for row in rows]
    bench.finish(
        CommandResult(
            command="startup",
            arguments={"systems": names, "context": context, "rounds": rounds},
            rows=rows,
            columns=_COLUMNS,
            plots=[bars(labelled, x="label", ys=PHASES, label="seconds to the first token")],
        )
    )


def measure(
    bench: BenchRun, names: Sequence[str], *, context: int, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each round and system, with empty and with filled caches."""
    bench.config = _with_default_model(bench.config)
    rows = []
    for number_of_round in range(1, rounds + 1):
        for name in names:
            with tempfile.TemporaryDirectory() as directory:
                env = {variable: str(Path(directory, sub)) for variable, sub in _CACHES.items()}
                for caches in ("cold", "warm"):
                    row: dict[str, Any] = {"system": name, "caches": caches}
                    row["round"] = number_of_round
                    try:
                        row |= _time_start(bench, name, env, context)
                    except WorkerError as error:
                        row["failure"] = str(error)
                    rows.append(row)
    return rows


def _with_default_model(config: Config) -> Config:
    """Return the config with the path of the default model, so that no start downloads it."""
    if config.model.name is not None or config.model.weights != "auto":
        return config
    model = config.model.model_copy(update={"name": str(default_model())})
    return config.model_copy(update={"model": model})


def _time_start(bench: BenchRun, name: str, env: dict[str, str], context: int) -> dict[str, float]:
    """Return the seconds of one start by phase; `other` is the time outside of all phases."""
    prompts = random_prompts(1, context, vocab_size=bench.roofline.vocab_size, seed=0)
    request = {"prompts": prompts, "output_lengths": [1], "temperature": 0.0}
    setup = make_setup(bench.config, bench.roofline)
    began = time.perf_counter()
    with open_worker(name, setup, bench.options, env=env) as worker:
        process = time.perf_counter() - began
        ready = worker.call("start")
        first = worker.call("generate", **request)["seconds"]
        total = time.perf_counter() - began
        phases: dict[str, float] = worker.call("phases") if name.startswith("ours") else {}
    known = {"process": process, **phases, "first token": first}
    other = max(0.0, total - sum(known.values()))
    return {"total": total, **known, "other": other, "ready": ready}
