"""The fingerprint of everything that a compiled step depends on, except its bucket."""

import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from compiled_llm.config.schema import Config
from compiled_llm.models.exported_model import ServedModel, underlying_model
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.kv_cache import KVCacheGroup
from compiled_llm.system.cpu import instruction_set
from passes.ops.cpu.vector_isa import vector_isa
from passes.pipeline import source_digest

_ROOT = Path(__file__).parents[3]
# Settings of the compiler that differ between machines and do not change the code.
_IRRELEVANT_SETTINGS = ("compile_threads", "worker_start_method", "debug_dir_root", "trace.")
# The source that determines graphs and kernels.
_SOURCES = ("compiled_llm/models", "compiled_llm/runtime", "passes")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything that a compiled step depends on, except its bucket.

    Attributes:
        parts: readable descriptions, by name.
        settings: of torch's compiler, as JSON, by name; most of them defaults.
    """

    parts: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return hash_of(json.dumps([self.parts, self.settings], sort_keys=True).encode())

    def differences(self, other: "Fingerprint") -> list[str]:
        """Return a line for each part in which the other fingerprint differs."""
        mine, theirs = self.parts | self.settings, other.parts | other.settings
        pairs = [
            (name, mine.get(name, "nothing"), theirs.get(name, "nothing")) for name in mine | theirs
        ]
        return [f"{name}: {mine}; here: {others}" for name, mine, others in pairs if mine != others]


def make_key(
    model: ServedModel,
    code: str,
    buffers: Sequence[nn.Module],
    groups: Sequence[KVCacheGroup],
    config: Config,
    limits: Limits,
) -> Fingerprint:
    """Return the fingerprint of an engine.

    Args:
        model: of the engine.
        code: identifies the code that the model runs (see `model_source.identify`).
        buffers: the modules that hold the step's buffers and caches, allocated.
        groups: the KV cache groups.
        config: of the engine.
        limits: of the engine.
    """
    seqs, tokens, length = limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len
    pages = " + ".join(str(group.num_pages) for group in groups)
    pages = f"{pages} pages of {config.cache.block_size} tokens"
    options = {"passes": config.pass_order(), **config.compile.options}
    source = " ".join(source_digest(_ROOT / folder) for folder in _SOURCES)
    parts = {
        **{package: version(package) for package in ("torch", "triton", "transformers")},
        "python": platform.python_version(),
        "compiled_llm": f"source {_short(source)}",
        "device": _device(model.device),
        "torch's state": _torch_state(model.device),
        "model": _model(underlying_model(model)),
        "code": code,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": f"layout {_short(_layout([model]))}",
        "limits": f"{seqs} sequences, {tokens} tokens a step, {length} each",
        "KV cache": f"{pages}, layout {_short(_layout(buffers))}",
        "passes and options": ", ".join(
            f"{name}={value}" for name, value in sorted(options.items())
        ),
    }
    return Fingerprint(parts, settings=compiler_settings())


def _model(model: PreTrainedModel) -> str:
    config = json.loads(model.config.to_json_string(use_diff=False), object_hook=_without_path)
    return f"{type(model).__name__}, config {_short(json.dumps(config, sort_keys=True))}"


def _without_path(values: dict[str, object]) -> dict[str, object]:
    """Remove the path of the checkpoint, which does not change the model."""
    return {name: value for name, value in values.items() if name != "_name_or_path"}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        return f"{name}, capability {major}.{minor}, CUDA {torch.version.cuda}"
    capability = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    # Inductor's C++ contains the number of threads.
    threads = f"{torch.get_num_threads()} threads"
    instructions = f"instruction set {instruction_set()}"
    return f"CPU, {capability}, {instructions}, {threads}, kernels of {vector_isa()}"


def _torch_state(device: torch.device) -> str:
    """Describe the global settings of torch that are compiled into a step."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    parts = {
        "default": f"{torch.get_default_dtype()} on {torch.get_default_device()}",
        "autocast": autocast,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def compiler_settings() -> dict[str, str]:
    """Return the settings of torch's compiler that can change its output, as JSON, by name."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    site = str(Path(torch.__file__).parents[1])
    return {
        f"{config.__name__}.{name}": _as_json(value).replace(site, "")
        for config in (dynamo, functorch, inductor)
        for name, value in config.get_config_copy().items()
        if not name.startswith(_IRRELEVANT_SETTINGS)
    }


def _as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=_name_of)


def _name_of(value: object) -> str:
    return getattr(value, "__qualname__", str(type(value)))


def _layout(modules: Iterable[nn.Module]) -> str:
    """Describe all tensors: names, shapes, dtypes, strides, shared storages and offsets."""
    lines, storages = [], dict[int, int]()
    for module in modules:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            number = storages.setdefault(tensor.untyped_storage().data_ptr(), len(storages))
            place = (number, tensor.storage_offset(), tensor.data_ptr() % 16)
            lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {place}")
    return "\n".join(lines)


def _short(text: str) -> str:
    return hash_of(text.encode())[:12]


def hash_of(content: bytes) -> str:
    """Return the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
