"""What configs/*.yaml and `--set a.b=c` may say; `config_file` reads them."""

import difflib
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    field_validator,
    model_validator,
)

from passes import PASSES


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _parse_whole(value: object) -> object:
    """Accept a float that is a whole number, such as 1e3, but no bool, which Python counts among the integers."""
    if isinstance(value, bool):
        raise ValueError(f"expected a whole number, got {value}")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse_bytes(value: object) -> object:
    if not isinstance(value, str) or value == "auto":
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?\s*", value)
    if match is None:
        raise ValueError(f"expected auto or a size such as 512MiB or 2GiB, got {excerpt(value)}")
    number, unit = match.groups()
    base = 1024 if unit and unit.endswith("i") else 1000
    return int(Decimal(number) * base ** (" KMGT".index(unit[0]) if unit else 0))


def _parse_path(value: object) -> object:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError(f"expected a path, got {value!r}")
    return value


# Strict: pydantic would otherwise take true and "4" for numbers, and 1 for true. The upper bounds only catch slips.
Whole = Annotated[int, BeforeValidator(_parse_whole), Field(strict=True)]
Real = Annotated[float, Field(strict=True)]
NumSeqs = Annotated[Whole, Field(gt=0, le=2**16)]
NumTokens = Annotated[Whole, Field(gt=0, le=2**24)]
Bytes = Annotated[Whole, BeforeValidator(_parse_bytes), Field(gt=0, le=2**50)]
FilePath = Annotated[Path, BeforeValidator(_parse_path)]
Auto = Literal["auto"]
Sampler = Literal["greedy", "random", "full", "scoring"]


class ModelConfig(Section):
    """Which model, and how it is loaded.

    name: a directory with safetensors, a hub id, a .gguf file, or (with random weights) a bare config.json; when None, the
    default model, SmolLM2-135M-Instruct.
    revision: a branch, tag or commit of a hub id; a commit always names the same files.
    weights: `auto` reads the checkpoint; `random` initialises from the config, seeded, directly on the device.
    trust_remote_code: run code that comes with the checkpoint, where transformers does not know the model; else that is refused.
    """

    name: Annotated[str, Field(min_length=1)] | None = None
    revision: Annotated[str, Field(min_length=1)] | None = None
    weights: Literal["auto", "random"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    trust_remote_code: StrictBool = False


class LimitsConfig(Section):
    """The most of each at once. `auto`: 4 sequences, 256 tokens a step and 2048 a sequence on a CPU; 64, 2048 and 4096 on a GPU.

    max_waiting: requests that may wait for their turn; one more is refused. None: any number.
    max_waiting_seconds: a request that has waited longer without having begun is aborted. None: it may wait for ever.
    """

    max_num_seqs: NumSeqs | Auto = "auto"
    max_num_batched_tokens: NumTokens | Auto = "auto"
    max_model_len: NumTokens | Auto = "auto"
    max_waiting: Annotated[Whole, Field(gt=0, lt=2**31)] | None = None
    max_waiting_seconds: Annotated[Real, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _a_token_for_each_sequence(self) -> Self:
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if isinstance(seqs, int) and isinstance(tokens, int) and tokens < seqs:
            raise ValueError(
                f"max_num_batched_tokens={tokens} cannot serve max_num_seqs={seqs} in one step: raise or lower one of them"
            )
        return self


class CacheConfig(Section):
    """The paged KV cache.

    block_size: tokens a page, a power of two from 16 to 1024.
    prefix_caching: keep full pages of ended requests, and share pages of equal beginnings.
    memory: bytes of all pages; `auto` is what `max_num_seqs` sequences of `max_model_len` need, bounded by
    `gpu_memory_utilization` of the GPU, or a quarter of a CPU's available memory.
    """

    block_size: Whole = 16
    prefix_caching: StrictBool = True
    memory: Bytes | Auto = "auto"
    gpu_memory_utilization: Annotated[Real, Field(gt=0, le=1)] = 0.9

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if not 16 <= value <= 1024 or value & (value - 1):
            raise ValueError(f"expected a power of two from 16 to 1024, got {excerpt(value)}")
        return value


class MemoryConfig(Section):
    """Memory of the GPU for other things than weights and the KV cache.

    graphs: bytes that CUDA graphs and the pool they work in may take; they are set aside before the cache gets its share, and
    the least useful buckets for which there is no room are left out. `auto` records all buckets, in what `gpu_memory_utilization`
    leaves. Nothing is recorded on a CPU.
    """

    graphs: Bytes | Auto = "auto"


class BucketsConfig(Section):
    """Static shapes to compile: sequences of a decode step, tokens of a prefill step, and samplers for each of them.

    `auto` generates sizes from the limits, each `growth` times the one before, at least 1.05. The limit itself is always a bucket,
    except in an empty list. Without prefill buckets, prefill runs eagerly. Without decode buckets, decoding runs in the prefill
    buckets: with a single one of those, all steps have one shape, and the same request gives the same bits whatever runs beside it.

    samplers: `greedy`; `random`, temperature and seed; `full`, everything; `scoring`, everything and logprobs of the prompt.
    Each serves all that those before it serve, at a higher price; what none serves runs eagerly. `auto`: greedy and full.
    """

    decode: list[NumSeqs] | Auto = "auto"
    prefill: list[NumTokens] | Auto = "auto"
    growth: Annotated[Real, Field(ge=1.05)] = 4.0
    samplers: Annotated[list[Sampler], Field(min_length=1)] | Auto = "auto"

    def listed_samplers(self) -> list[Sampler]:
        """The samplers to compile, cheap to dear."""
        listed: list[Sampler] = ["greedy", "full"] if self.samplers == "auto" else self.samplers
        return [sampler for sampler in get_args(Sampler) if sampler in listed]


# What each `compile.level` stands for.
LEVELS: dict[int, dict[str, Any]] = {
    0: {"dispatch": "eager"},
    1: {"capture": "lazy"},
    2: {},
    3: {"options": {"max_autotune": True, "coordinate_descent_tuning": True}},
}


class CompileConfig(Section):
    """How a step is compiled and launched.

    level: a preset for the other keys, which win where they are given: 0 compiles nothing; 1 starts fast and compiles what is
    needed while it serves; 2 compiles all buckets first; 3 also times every kernel's variants, which can take minutes.
    dispatch: `direct` compiles ahead of time and replays the graph trees' recordings; `torch` calls
    `torch.compile(mode="reduce-overhead")`; `eager` compiles nothing.
    artifact: a directory that keeps what was compiled, for the next start; `auto` is one in the user's cache directory
    ($COMPILED_LLM_CACHE), `off` is none. Only `direct` has one, and not while graphs are dumped.
    cache_limit: bytes of artifacts in the cache directory; beyond it, those unused for the longest are removed.
    capture: `start` compiles and captures all buckets before the first request; `lazy` serves at once, eagerly or in the next
    larger bucket that is ready, and captures a bucket between steps when steps have asked for it, the busiest first.
    dump: a directory for the graph before and after each pass.
    options: Inductor options, e.g. `coordinate_descent_tuning: true`.
    processes: how many may compile buckets side by side, where an artifact is kept; with 0 the engine compiles them one after
    another. `auto` is one less than there are cores, up to 16; 0 with fewer than 4 cores, and for a GPU, where it is not proven.
    """

    level: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_parse_whole)] = 2
    dispatch: Literal["direct", "torch", "eager"] = "direct"
    artifact: Literal["auto", "off"] | FilePath = "auto"
    cache_limit: Bytes = 10 * 2**30
    capture: Literal["start", "lazy"] = "start"
    dump: FilePath | None = None
    options: dict[str, JsonValue] = {}
    processes: Annotated[Whole, Field(ge=0, le=1024)] | Auto = "auto"

    @model_validator(mode="before")
    @classmethod
    def _what_the_level_stands_for(cls, values: object) -> object:
        level = values.get("level") if isinstance(values, dict) else None
        if (
            not isinstance(values, dict)
            or not isinstance(level, int | float)
            or level not in LEVELS
        ):  # refused below, or none
            return values
        preset, options = LEVELS[int(level)], values.get("options")
        if isinstance(options, dict) and "options" in preset:
            values = {**values, "options": {**preset["options"], **options}}
        return {**preset, **values}

    @field_validator("artifact", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: object) -> object:
        return "off" if value is False else value


class Config(Section):
    """One deployment.

    strict: make fallbacks, graph skips, recompiles and re-records errors.
    verify: when the engine starts, compare each bucket with eager on random batches, and do not use one that differs.
    passes: on or off by name; those named run in the order given, before the ones left out.
    """

    model: ModelConfig = ModelConfig()
    limits: LimitsConfig = LimitsConfig()
    cache: CacheConfig = CacheConfig()
    memory: MemoryConfig = MemoryConfig()
    buckets: BucketsConfig = BucketsConfig()
    compile: CompileConfig = CompileConfig()
    passes: dict[str, StrictBool] = {}
    strict: StrictBool = False
    verify: StrictBool = False

    @field_validator("passes")
    @classmethod
    def _known_passes(cls, value: dict[str, bool]) -> dict[str, bool]:
        for name in value:
            if name not in PASSES:
                raise ValueError(f"unknown pass {name!r}{nearest(name, PASSES)}")
        return value

    @model_validator(mode="after")
    def _strict_compiles(self) -> Self:
        if self.strict and self.compile.dispatch == "eager":
            raise ValueError(
                "strict forbids eager steps, and compile.dispatch=eager has no others: drop one of the two"
            )
        if self.strict and self.compile.capture == "lazy":
            raise ValueError(
                "strict forbids eager steps, and compile.capture=lazy begins with them: drop one of the two"
            )
        return self

    def pass_order(self) -> list[str]:
        """Names of the passes that are on, in the order in which they run."""
        names = [*self.passes, *(name for name in PASSES if name not in self.passes)]
        return [name for name in names if self.passes.get(name, True)]


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not among those known."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {matches[0]!r}?" if matches else f": expected one of {', '.join(known)}"


def excerpt(value: object) -> str:
    """A value as an error shows it: one line of at most 80 characters."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # Python prints no integer of more than 4,300 digits
        shown = f"a very large {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
