"""What the machine and the model allow: bandwidth as measured, bytes that a decode step must read, and the ceiling they set."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from compiled_llm.config.loader import parse_config
from compiled_llm.config.schema import Config, ModelConfig
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.default_model import default_model
from compiled_llm.models.discovery import examine_model
from compiled_llm.models.loading import resolve_device
from compiled_llm.runtime.limits import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The facts that every table is read against.

    Attributes:
        model, device, device_name, dtype: resolved.
        parameters: of the model, tied ones once.
        weight_bytes: read in a decode step of one sequence; an input embedding that is not also the output's is not.
        kv_bytes: that one token takes in the cache, all layers together; None where the model's attention is not served.
        copy_bandwidth, read_bandwidth: bytes a second, medians; a copy counts what it reads and what it writes.
        max_num_seqs, max_num_batched_tokens, max_model_len: the config's limits, resolved.
    """

    model: str
    device: str
    device_name: str
    dtype: str
    vocab_size: int
    parameters: int
    weight_bytes: int
    kv_bytes: int | None
    copy_bandwidth: float
    read_bandwidth: float
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    @property
    def ceiling(self) -> float:
        """Tokens a second at batch 1, were reading the weights all there is to do."""
        return self.read_bandwidth / self.weight_bytes

    def least_ms(self, batch: int, context: int) -> float:
        """Milliseconds in which a decode step could read the weights and the cache of `batch` sequences of `context` tokens."""
        return (
            (self.weight_bytes + batch * context * (self.kv_bytes or 0)) / self.read_bandwidth * 1e3
        )

    def lines(self) -> list[tuple[str, str]]:
        """Names and values to print."""
        kv = "unknown" if self.kv_bytes is None else f"{self.kv_bytes / 1024:.1f} KiB"
        return [
            ("model", f"{self.model}, {self.parameters / 1e6:.1f} M parameters, {self.dtype}"),
            ("device", self.device_name),
            (
                "copy, read bandwidth",
                f"{self.copy_bandwidth / 1e9:,.1f}, {self.read_bandwidth / 1e9:,.1f} GB/s, measured",
            ),
            ("weights a step, batch 1", f"{self.weight_bytes / 2**20:,.1f} MiB"),
            ("KV cache a token", kv),
            (
                "ceiling at batch 1",
                f"{self.ceiling:,.0f} tokens/s ({self.least_ms(1, 0):.4f} ms a step)",
            ),
        ]


class RooflineProbe:
    """Makes the card in a process of its own, so that none of the device's memory stays taken."""

    def measure(self, config: dict[str, Any]) -> dict[str, Any]:
        """The fields of a `Roofline`."""
        return asdict(make_card(parse_config(config)))


def make_card(config: Config) -> Roofline:
    """Measure the device, and count what the config's model reads."""
    device = resolve_device(config.model)
    model_config = _model_config(config.model)
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = _skeleton(
        model_config,
        default if config.model.dtype == "auto" else getattr(torch, config.model.dtype),
    )
    limits = Limits.resolve(config.limits, model_config, device)
    copied, read = measure_bandwidth(device)
    return Roofline(
        model=type(model).__name__,
        device=device.type,
        device_name=device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model_config.get_text_config().vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=weight_bytes(model),
        kv_bytes=_kv_bytes(model),
        copy_bandwidth=copied,
        read_bandwidth=read,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's and how many threads torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters that a decode step of one sequence reads; of experts, those that one token is sent to."""
    config = model.config.get_text_config()
    experts = (
        getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    )
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    lookups: list[Tensor] = [
        module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)
    ]
    head = model.get_output_embeddings().weight
    total = 0
    for parameter in model.parameters():
        if any(parameter is table for table in lookups) and parameter is not head:
            continue  # one row of it
        size = parameter.numel() * parameter.element_size()
        routed = experts and parameter.dim() == 3 and parameter.shape[0] == experts
        total += size * chosen // experts if routed else size
    return total


def measure_bandwidth(
    device: torch.device, *, num_bytes: int | None = None, repeats: int = 20
) -> tuple[float, float]:
    """Bytes a second of a copy (what it reads and writes) and of a read, medians of `repeats`; on a GPU of 1 GiB each."""
    size = num_bytes or (2**30 if device.type == "cuda" else 2**27)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = _median_seconds(lambda: target.copy_(source), device, repeats)
    read = _median_seconds(
        lambda: read_sums(source) if device.type == "cuda" else source.sum(), device, repeats
    )
    return 2 * size / copied, size / read


def _median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    for _ in range(3):
        run()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            seconds.append(float(begin.elapsed_time(end)) / 1e3)
        else:
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@triton.jit
def _read_sums_kernel(out, x, count, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program adds up one tile."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + at, mask=at < count, other=0.0), 0))


def read_sums(x: Tensor) -> Tensor:
    """Sums of tiles of a float32 vector: reads all of it and writes next to nothing."""
    tile = 8192
    out = x.new_empty(triton.cdiv(x.numel(), tile))
    _read_sums_kernel[(out.numel(),)](out, x, x.numel(), TILE=tile, num_warps=8)
    return out


def _model_config(config: ModelConfig) -> PretrainedConfig:
    path = default_model() if config.name is None else Path(config.name)
    place, file = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(place, **file)
    except OSError as error:
        raise ValueError(f"the config of model {config.name!r} cannot be read: {error}") from None
    return found


def _skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval()
    return model


def _kv_bytes(model: PreTrainedModel) -> int | None:
    try:
        with attention_routed(model):
            return sum(layer.bytes_per_token for layer in examine_model(model)[1])
    except (ValueError, RuntimeError, NotImplementedError):
        return None
