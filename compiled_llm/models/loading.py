"""Load a checkpoint as a transformers model and tokenizer, on a device and in a dtype."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
)

from compiled_llm.config.schema import ModelConfig
from compiled_llm.errors import UnsupportedModelError
from compiled_llm.models.default_model import default_model
from compiled_llm.models.gguf_file import gguf_parsed_once
from compiled_llm.models.preflight import check_supported, code_arguments
from compiled_llm.system.compiler_lock import COMPILER_LOCK, eager_steps_excluded

_TOKENIZER_FILE = re.compile(r"token|vocab|spiece|sentencepiece|merges|tekken|\.(model|spm|bpe)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A loaded checkpoint.

    Attributes:
        model: the model, in eval mode.
        tokenizer: None if the checkpoint has none that can be loaded; prompts are then token ids.
        tokenizer_failure: why the tokenizer could not be loaded; None if it was loaded, or if the
            checkpoint has none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_failure: str | None = None


def load(config: ModelConfig) -> LoadedModel:
    """Load the config's model; only one model is loaded at a time.

    Raises:
        UnsupportedModelError: the model's config shows that it is not supported; no weight is read.
        ValueError: the checkpoint is missing or incomplete.
    """
    with COMPILER_LOCK, _default_dtype_guarded():
        return _load(config)


@contextmanager
def _default_dtype_guarded() -> Iterator[None]:
    """Exclude eager steps while transformers builds a model.

    transformers then sets torch's default dtype to the model's, in all threads.
    """
    set_default = modeling_utils.local_torch_dtype

    @contextmanager
    def guarded(*args: Any, **kwargs: Any) -> Iterator[None]:
        with eager_steps_excluded(), set_default(*args, **kwargs):
            yield

    with patch.object(modeling_utils, "local_torch_dtype", guarded):
        yield


def _load(config: ModelConfig) -> LoadedModel:
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    if config.weights == "random":
        return _initialise(config, device, dtype)
    path, files = _locate(config)
    with gguf_parsed_once() if "gguf_file" in files else nullcontext():
        model_config = _read_config(config, path, files)
        check_supported(model_config, dtype, trust_remote_code=config.trust_remote_code)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, device_map={"": device}, **files
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"model {config.name!r} cannot be loaded: {_first_line(error)}"
            ) from error
        tokenizer, failure = _load_tokenizer(path, files)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, tokenizer_failure=failure)


def read_config(config: ModelConfig) -> PretrainedConfig:
    """Return the transformers config of the config's model, without reading weights.

    Raises:
        UnsupportedModelError: the model needs code from its checkpoint, and `trust_remote_code` is
            not set.
        ValueError: the model has no config, or it cannot be read.
    """
    if config.weights == "random":
        if config.name is None:
            raise ValueError(
                "model.weights=random needs model.name: expected a config.json or a directory that "
                "holds one, got none"
            )
        is_local = Path(config.name).exists()
        return _read_config(
            config,
            config.name,
            {"trust_remote_code": config.trust_remote_code, **_revision(config, is_local)},
        )
    path, files = _locate(config)
    with gguf_parsed_once() if "gguf_file" in files else nullcontext():
        return _read_config(config, path, files)


def _read_config(config: ModelConfig, path: str, files: dict[str, Any]) -> PretrainedConfig:
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(path, **files)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"model {config.name!r} needs code from its checkpoint, which runs only with "
                "model.trust_remote_code=true"
            ) from error
        raise ValueError(
            f"model config {config.name!r} cannot be read: {_first_line(error)}"
        ) from error
    return found


def resolve_device(config: ModelConfig) -> torch.device:
    """Return the device; `auto` is the current GPU if there is one, else the CPU."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError(
            "model.device=cuda, but torch sees no GPU here: use model.device=cpu or auto"
        )
    if available and config.device != "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _locate(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return the path or hub id for transformers' `from_pretrained`, and its other arguments."""
    revision = _revision(config, is_local=config.name is None or Path(config.name).exists())
    trust = {"trust_remote_code": config.trust_remote_code}
    path = default_model() if config.name is None else Path(config.name)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name, **trust}
    if path.is_file():
        raise ValueError(
            f"model {config.name!r} is a file but not a .gguf: expected a directory, or "
            "model.weights=random for a config"
        )
    if path.is_dir():
        if not list(path.glob("*.safetensors")):
            raise ValueError(
                f"model directory {config.name!r} holds no *.safetensors: add the weights, or set "
                "model.weights=random"
            )
        return str(path), trust
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(config.name)):
        raise ValueError(
            f"model {config.name!r} is neither an existing path nor a hub id such as "
            "Qwen/Qwen3-0.6B"
        )
    return str(config.name), {**trust, **revision}


def _revision(config: ModelConfig, is_local: bool) -> dict[str, str]:
    """Return the `revision` argument of a hub id; local files have none."""
    if config.revision is None:
        return {}
    if is_local:
        name = "the default model" if config.name is None else f"model {config.name!r}"
        raise ValueError(
            f"model.revision={config.revision} names a version of a hub id, but {name} is a local "
            "path: drop model.revision"
        )
    return {"revision": config.revision}


def _initialise(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    model_config = read_config(config)
    check_supported(model_config, dtype, trust_remote_code=config.trust_remote_code)
    code = code_arguments(model_config, config.trust_remote_code)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **code)
    return LoadedModel(model=model.eval(), tokenizer=None)


def _load_tokenizer(
    path: str, files: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """Return the tokenizer, or None and the reason; no reason if the checkpoint has none."""
    if Path(path).is_dir() and "gguf_file" not in files:
        names = [entry.name for entry in Path(path).iterdir()]
        if not any(map(_TOKENIZER_FILE.search, names)):
            return None, None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **files)
        if len(tokenizer) <= len(getattr(tokenizer, "added_tokens_decoder", ())):
            raise ValueError("its files hold no vocabulary")  # transformers creates an empty one
    except Exception as error:  # the libraries raise errors of many classes for invalid files
        failure = f"{type(error).__name__}: {_first_line(error)}"
        warnings.warn(
            f"the tokenizer in {path} cannot be loaded, so prompts must be token ids: {failure}",
            stacklevel=4,
        )
        return None, failure
    return tokenizer, None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
