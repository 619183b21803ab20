"""Start an engine: resolve its config, examine the model and prepare a model runner."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import compiled_llm
from compiled_llm.config.loader import load_config, parse_config
from compiled_llm.config.schema import Config
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import AttentionLayer, examine_model
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.models.rotary import fixed_frequencies
from compiled_llm.models.token_independence import check_token_independence
from compiled_llm.models.vocabulary import check_vocabulary
from compiled_llm.models.weight_packing import linears_by_input, packed_weights
from compiled_llm.report.report import PhaseReport, Report, StartupReport
from compiled_llm.runtime.compilation.worker_pool import CompilePool
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.runtime.model_runner import ModelRunner
from compiled_llm.system.compiler_lock import COMPILER_LOCK, eager_steps_excluded

ConfigLike = Config | str | Path | dict[str, Any] | None


def resolve_config(config: ConfigLike) -> Config:
    """Return the config of a `Config`, a dict, the path of a YAML file, or None for the defaults.

    Raises:
        ValueError: it is none of these, or a key or value is not valid.
    """
    if isinstance(config, Config):
        return config
    if not isinstance(config, str | Path | dict | None):
        raise ValueError(
            "config must be a Config, a dict, the path of a YAML file or None, "
            f"got {type(config).__name__}"
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
    model: PreTrainedModel,
    config: Config,
    report: Report,
    resources: ExitStack,
    *,
    progress: bool,
    pool: CompilePool | None,
    just_loaded: bool = False,
) -> ModelRunner:
    """Prepare a model and return the runner of its compiled steps; one engine starts at a time.

    Args:
        model: the model; its attention is routed to the engine.
        config: the settings.
        report: receives phases, facts and warnings.
        resources: restores the model when closed.
        progress: show progress bars.
        pool: processes that compile buckets, or None.
        just_loaded: whether the model is as transformers loaded it, unchanged by a user, so that
            its source code determines what it computes.

    Raises:
        UnsupportedModelError: the model needs a feature that is not supported.
        ValueError: the config does not fit the model or the machine.
    """
    limits = Limits.resolve(config.limits, model.config, model.device)
    with COMPILER_LOCK:
        with eager_steps_excluded(), report.phase("examine model", model.device):
            served, layers = _prepare_model(model, config, limits, resources)
        model_runner = ModelRunner(
            served, layers, config, report, progress=progress, pool=pool, just_loaded=just_loaded
        )
    report.facts.update(_facts(model_runner, model))
    return model_runner


def _prepare_model(
    model: PreTrainedModel, config: Config, limits: Limits, resources: ExitStack
) -> tuple[ServedModel, list[AttentionLayer]]:
    """Route the model's attention, check that it is supported, and pack its weights."""
    resources.enter_context(attention_routed(model))
    resources.enter_context(fixed_frequencies(model))
    with linears_by_input(model) as groups:
        served, layers = examine_model(model)
    check_vocabulary(model)
    check_token_independence(served, limits.max_model_len)
    merges = config.compile.dispatch != "eager" and "merge_projections" in config.pass_order()
    resources.enter_context(packed_weights(model, groups if merges else []))
    return served, layers


def _facts(model_runner: ModelRunner, model: PreTrainedModel) -> dict[str, str | int]:
    memory, limits = model_runner.memory, model_runner.limits
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    size = f"{model.num_parameters() / 1e6:.0f} M parameters"
    return {
        "model": f"{type(model).__name__}, {size}, {model.dtype}, on {device}",
        "KV cache": ", ".join(_describe(group, memory.block_size) for group in memory.groups),
        "limits": f"{limits.max_num_seqs} sequences, {limits.max_num_batched_tokens} tokens a "
        f"step, {limits.max_model_len} each",
    }


def _describe(group: KVCacheGroup, block_size: int) -> str:
    reach = "" if group.reach.is_full else f" with {group.reach}"
    return f"{group.num_pages} pages of {block_size} tokens for {len(group.layers)} layers{reach}"
