"""Roofline of decode: measured memory bandwidth and the bytes that a decode step must read."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
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

_TILE = 8192  # elements that one program of the reading kernel sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The model, the device and the resolved limits of a run.

    Attributes:
        model: class name of the model.
        device: device type.
        device_name: name of the GPU, or of the CPU with its number of threads.
        dtype: dtype of the weights.
        vocab_size: number of token ids.
        parameters: number of parameters; tied parameters count once.
        weight_bytes: bytes of weights that a decode step of one sequence reads.
        kv_bytes: bytes of one token in the KV cache, all layers together; None if the model's
            attention is unsupported.
        copy_bandwidth: median bytes per second of a copy, reads and writes added.
        read_bandwidth: median bytes per second of a read.
        max_num_seqs: resolved limit on sequences in a batch.
        max_num_batched_tokens: resolved limit on tokens in a step.
        max_model_len: resolved limit on tokens in a sequence.
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
        """Return the tokens per second at batch 1 if a step only read the weights."""
        return self.read_bandwidth / self.weight_bytes

    def min_step_ms(self, batch: int, context: int) -> float:
        """Return the milliseconds to read the weights and the KV cache of a batch once.

        Args:
            batch: number of sequences.
            context: number of cached tokens of each sequence.
        """
        num_bytes = self.weight_bytes + batch * context * (self.kv_bytes or 0)
        return num_bytes / self.read_bandwidth * 1e3

    def lines(self) -> list[tuple[str, str]]:
        """Return names and values to print."""
        size = f"{self.parameters / 1e6:.1f} M parameters"
        copy, read = self.copy_bandwidth / 1e9, self.read_bandwidth / 1e9
        step_ms = self.min_step_ms(1, 0)
        kv = "unknown" if self.kv_bytes is None else f"{self.kv_bytes / 1024:.1f} KiB"
        return [
            ("model", f"{self.model}, {size}, {self.dtype}"),
            ("device", self.device_name),
            ("copy, read bandwidth", f"{copy:,.1f}, {read:,.1f} GB/s, measured"),
            ("weights per step, batch 1", f"{self.weight_bytes / 2**20:,.1f} MiB"),
            ("KV cache per token", kv),
            ("ceiling at batch 1", f"{self.ceiling:,.0f} tokens/s ({step_ms:.4f} ms per step)"),
        ]


class RooflineProbe:
    """Target of a worker process that measures a `Roofline`."""

    def measure(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a `Roofline`."""
        return asdict(measure_roofline(parse_config(config)))


def measure_roofline(config: Config) -> Roofline:
    """Measure the device's bandwidth and count the bytes that the config's model reads."""
    device = resolve_device(config.model)
    model_config = _model_config(config.model)
    model = _meta_model(model_config, _dtype(config.model, device))
    limits = Limits.resolve(config.limits, model_config, device)
    copy_bandwidth, read_bandwidth = measure_bandwidth(device)
    return Roofline(
        model=type(model).__name__,
        device=device.type,
        device_name=device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model_config.get_text_config().vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=weight_bytes(model),
        kv_bytes=_kv_bytes(model),
        copy_bandwidth=copy_bandwidth,
        read_bandwidth=read_bandwidth,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
    )


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the parameters that a decode step of one sequence reads.

    An input embedding that is not tied to the output is left out, because a step reads one row of
    it. Of a layer's experts, those that one token is routed to count.
    """
    config = model.config.get_text_config()
    num_experts = (
        getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    )
    num_routed = getattr(config, "num_experts_per_tok", None) or num_experts
    embeddings: list[Tensor] = [
        module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)
    ]
    head = model.get_output_embeddings().weight
    total = 0
    for parameter in model.parameters():
        if any(parameter is table for table in embeddings) and parameter is not head:
            continue
        size = parameter.numel() * parameter.element_size()
        of_experts = num_experts and parameter.dim() == 3 and parameter.shape[0] == num_experts
        total += size * num_routed // num_experts if of_experts else size
    return total


def measure_bandwidth(
    device: torch.device, *, num_bytes: int | None = None, repeats: int = 20
) -> tuple[float, float]:
    """Return the bytes per second of a copy (reads and writes added) and of a read.

    Args:
        device: device whose memory is measured.
        num_bytes: size of the tensor; 1 GiB on a GPU and 128 MiB on a CPU if None.
        repeats: number of measurements, of which the median is taken.
    """
    size = num_bytes or (2**30 if device.type == "cuda" else 2**27)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    read: Callable[[], object] = source.sum
    if device.type == "cuda":
        read = partial(read_sums, source)
    copy_seconds = _median_seconds(lambda: target.copy_(source), device, repeats)
    return 2 * size / copy_seconds, size / _median_seconds(read, device, repeats)


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
    """Each program sums one tile."""
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tile = tl.load(x + offsets, mask=offsets < count, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(tile, 0))


def read_sums(x: Tensor) -> Tensor:
    """Return the sums of tiles of a float32 vector [N], which reads N and writes few elements."""
    out = x.new_empty(triton.cdiv(x.numel(), _TILE))
    _read_sums_kernel[(out.numel(),)](out, x, x.numel(), TILE=_TILE, num_warps=8)
    return out


def _dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def _model_config(config: ModelConfig) -> PretrainedConfig:
    path = default_model() if config.name is None else Path(config.name)
    directory, options = path, {}
    if path.suffix == ".gguf":
        directory, options = path.parent, {"gguf_file": path.name}
    try:
        loaded: PretrainedConfig = AutoConfig.from_pretrained(directory, **options)
    except OSError as error:
        raise ValueError(f"the config of model {config.name!r} cannot be read: {error}") from None
    return loaded


def _meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model on the meta device, without memory for its weights."""
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
