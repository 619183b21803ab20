"""A start: from a config as a user may give it to a runtime that is ready, and the report that tells of it."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import compiled_llm
from compiled_llm.config.loader import load_config, parse_config
from compiled_llm.config.schema import Config
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import check_token_independence, examine_model
from compiled_llm.models.rotary import fixed_frequencies
from compiled_llm.models.weight_packing import linears_by_input, packed_weights
from compiled_llm.report.report import PhaseReport, Report, StartupReport
from compiled_llm.runtime.compilation.worker_pool import CompilePool
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.model_runner import ModelRunner
from compiled_llm.system.compiler_lock import COMPILER_LOCK, eager_steps_excluded

ConfigLike = Config | str | Path | dict[str, Any] | None


def resolve_config(config: ConfigLike) -> Config:
    """What the user gave, as a `Config`; raises ValueError."""
    if isinstance(config, Config):
        return config
    if not isinstance(config, str | Path | dict | None):
        raise ValueError(
            f"config must be a Config, a dict, the path of a YAML file or None, got {type(config).__name__}"
        )
    return parse_config(config) if isinstance(config, dict) else load_config(config)


def new_report() -> Report:
    """Return a report that begins with the time to import the library.

    The time is known where the library is imported through the public names of `compiled_llm`.
    """
    seconds = compiled_llm.import_seconds
    imported = [PhaseReport(name="import", seconds=seconds, bytes=0)] if seconds else []
    return Report(startup=StartupReport(phases=imported))


def start(
    model: PreTrainedModel, config: Config, report: Report, resources: ExitStack, *, progress: bool, pool: CompilePool | None,
    just_loaded: bool = False,
) -> ModelRunner:  # fmt: skip
    """Route the model's attention here and compile it, one engine at a time; `resources` gives the model back as it was.

    With `just_loaded`, nobody has had the model since transformers loaded it, so its source tells what it computes.

    Raises:
        UnsupportedModelError: a ValueError that names the feature of the model which is not served.
        ValueError: the config does not fit the model or the machine.
    """
    limits = Limits.resolve(config.limits, model.config, model.device)
    with COMPILER_LOCK:
        with eager_steps_excluded(), report.phase("examine model", model.device):
            resources.enter_context(attention_routed(model))
            resources.enter_context(fixed_frequencies(model))
            with linears_by_input(model) as groups:
                served, layers = examine_model(model)
            check_token_independence(served, limits.max_model_len)
            wanted = (
                config.compile.dispatch != "eager" and "merge_projections" in config.pass_order()
            )
            resources.enter_context(packed_weights(model, groups if wanted else []))
        model_runner = ModelRunner(
            served, layers, config, report, progress=progress, pool=pool, just_loaded=just_loaded
        )
    report.facts.update(_facts(model_runner, model))
    return model_runner


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of token ids a prompt may hold: the rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def vocab_size(model: PreTrainedModel) -> int:
    """Return the number of token ids the model may generate: the rows of the output head.

    Some models embed a few more ids than they generate, such as the image token of Mllama.
    """
    head: Any = model.get_output_embeddings()
    return int(head.weight.shape[0])


def _facts(model_runner: ModelRunner, model: PreTrainedModel) -> dict[str, str | int]:
    memory, limits = model_runner.memory, model_runner.limits
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    return {
        "model": f"{type(model).__name__}, {model.num_parameters() / 1e6:.0f} M parameters, {model.dtype}, on {name}",
        "KV cache": ", ".join(_describe(group, memory.block_size) for group in memory.groups),
        "limits": f"{limits.max_num_seqs} sequences, {limits.max_num_batched_tokens} tokens a step, {limits.max_model_len} each",
    }


def _describe(group: KVCacheGroup, block_size: int) -> str:
    reach = "" if group.reach.is_full else f" with {group.reach}"
    return f"{group.num_pages} pages of {block_size} tokens for {len(group.layers)} layers{reach}"
