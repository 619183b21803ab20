"""For what a compilation is: all that a compiled step depends on besides its bucket, in words."""

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
_SHAPES_NOTHING = (
    "compile_threads",
    "worker_start_method",
    "debug_dir_root",
    "trace.",
)  # of the compiler; they differ by machine
_SOURCES = (
    "compiled_llm/models",
    "compiled_llm/runtime",
    "passes",
)  # all that shapes a graph or its kernels


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """All that a compiled step depends on besides its bucket, by name, in words.

    Attributes:
        settings: of torch's compiler, as JSON; in most places its defaults.
    """

    parts: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return hash_of(json.dumps([self.parts, self.settings], sort_keys=True).encode())

    def differences(self, other: "Fingerprint") -> list[str]:
        """A line for each part in which the other differs."""
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
    """The key of an engine whose buffers and caches are allocated; `code` identifies what the model runs."""
    seqs, tokens, length = limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len
    pages = " + ".join(str(group.num_pages) for group in groups)
    options = {"passes": config.pass_order(), **config.compile.options}
    return Fingerprint(
        {
            **{package: version(package) for package in ("torch", "triton", "transformers")},
            "python": platform.python_version(),
            "compiled_llm": f"source {_short(' '.join(source_digest(_ROOT / folder) for folder in _SOURCES))}",
            "device": _device(model.device),
            "torch's state": _torch_state(model.device),
            "model": _model(underlying_model(model)),
            "code": code,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": f"layout {_short(_layout([model]))}",
            "limits": f"{seqs} sequences, {tokens} tokens a step, {length} each",
            "KV cache": f"{pages} pages of {config.cache.block_size} tokens, layout {_short(_layout(buffers))}",
            "passes and options": ", ".join(
                f"{name}={value}" for name, value in sorted(options.items())
            ),
        },
        settings=compiler_settings(),
    )


def _model(model: PreTrainedModel) -> str:
    config = json.loads(model.config.to_json_string(use_diff=False), object_hook=_without_place)
    return f"{type(model).__name__}, config {_short(json.dumps(config, sort_keys=True))}"


def _without_place(values: dict[str, object]) -> dict[str, object]:
    """A checkpoint is the same wherever it lies."""
    return {name: value for name, value in values.items() if name != "_name_or_path"}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}, CUDA {torch.version.cuda}"
    units = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, instruction set {instruction_set()}"
    # Inductor's C++ has the number of threads in it.
    return f"CPU, {units}, {torch.get_num_threads()} threads, kernels of {vector_isa()}"


def _torch_state(device: torch.device) -> str:
    """What callers may have set in torch that is compiled into a step."""
    parts = {
        "default": f"{torch.get_default_dtype()} on {torch.get_default_device()}",
        "autocast": torch.is_autocast_enabled(device.type)
        and torch.get_autocast_dtype(device.type),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def compiler_settings() -> dict[str, str]:
    """What the user or the environment set in torch's compiler and can shape what it makes, as JSON, by name."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    site = str(Path(torch.__file__).parents[1])
    return {
        f"{config.__name__}.{name}": json.dumps(value, sort_keys=True, default=_name_of).replace(
            site, ""
        )
        for config in (dynamo, functorch, inductor)
        for name, value in config.get_config_copy().items()
        if not name.startswith(_SHAPES_NOTHING)
    }


def _name_of(value: object) -> str:
    return getattr(value, "__qualname__", str(type(value)))


def _layout(modules: Iterable[nn.Module]) -> str:
    """Names, shapes, dtypes and strides of all tensors, and which of them share a storage, where."""
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
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
