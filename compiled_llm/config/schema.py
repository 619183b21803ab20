"""The keys of a config, their types, bounds and defaults.

The docstrings are the source of docs/configuration.md: each key has a line `key: meaning`.
"""

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

from compiled_llm.config.field_types import (
    Auto,
    Bytes,
    FilePath,
    Integer,
    NumSeqs,
    NumTokens,
    Real,
    parse_integer,
)
from compiled_llm.config.messages import excerpt
from compiled_llm.config.pass_names import known_passes, resolve_pass_names

Sampler = Literal["greedy", "random", "full", "scoring"]


class Section(BaseModel):
    """Base class of the sections: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The model to load.

    name: a directory with safetensors files, a hub id, a .gguf file or, with `weights: random`, a
        bare config.json. `null` is the default model, SmolLM2-135M-Instruct.
    revision: branch, tag or commit of a hub id. Only a commit always names the same files.
    weights: `auto` reads the checkpoint. `random` reads the model's config alone and initialises
        the weights directly on the device, seeded with `seed`.
    dtype: dtype of weights, activations and KV cache. `auto` is float32 on a CPU and bfloat16 on a
        GPU.
    device: where the model runs. `auto` is the current GPU if torch sees one, else the CPU.
    seed: seed of the weights with `weights: random`. Sampling does not use it.
    trust_remote_code: run the code that comes with a checkpoint where transformers does not
        implement the model. `false` refuses such models.
    """

    name: Annotated[str, Field(min_length=1)] | None = None
    revision: Annotated[str, Field(min_length=1)] | None = None
    weights: Literal["auto", "random"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[Integer, Field(ge=0, lt=2**63)] = 0
    trust_remote_code: StrictBool = False


class LimitsConfig(Section):
    """The sizes that the engine is built for. Larger limits need more memory and more buckets.

    max_num_seqs: sequences that run at the same time; others wait. `auto` is 4 on a CPU and 64 on
        a GPU.
    max_num_batched_tokens: tokens that one step computes, of all sequences together; longer prompts
        are computed in chunks. At least `max_num_seqs`. `auto` is 256 on a CPU and 2048 on a GPU.
    max_model_len: tokens of one sequence, prompt and output together. `auto` is 2048 on a CPU and
        4096 on a GPU, or less where the model has fewer positions or its rope type (`longrope`,
        `dynamic`) changes its frequencies beyond a shorter length. A larger value than the model
        allows is refused.
    max_waiting: requests that may wait in the queue; one more is refused with `QueueFullError`.
        `null` is no limit.
    max_waiting_seconds: seconds that a request may wait in the queue before it is aborted. `null`
        is no limit.
    """

    max_num_seqs: NumSeqs | Auto = "auto"
    max_num_batched_tokens: NumTokens | Auto = "auto"
    max_model_len: NumTokens | Auto = "auto"
    max_waiting: Annotated[Integer, Field(gt=0, lt=2**31)] | None = None
    max_waiting_seconds: Annotated[Real, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check_tokens_suffice(self) -> Self:
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if isinstance(seqs, int) and isinstance(tokens, int) and tokens < seqs:
            raise ValueError(
                f"expected max_num_batched_tokens of at least max_num_seqs={seqs}, since a decode "
                f"step computes a token of each sequence, got {tokens}: raise the one or lower the "
                "other"
            )
        return self


class CacheConfig(Section):
    """The paged KV cache.

    block_size: tokens per block, a power of two from 16 to 1024.
    prefix_caching: keep the full blocks of finished requests, and share the blocks of prompts that
        begin with the same tokens.
    memory: bytes of the cache. `auto` is what `max_num_seqs` sequences of `max_model_len` tokens
        need, and at most `gpu_memory_utilization` of the GPU (weights, graphs and activations
        included) or a quarter of the memory that is free on a CPU.
    gpu_memory_utilization: fraction of the GPU's total memory that the process may use in all.
        Only `memory: auto` uses it, and only on a GPU.
    """

    block_size: Integer = 16
    prefix_caching: StrictBool = True
    memory: Bytes | Auto = "auto"
    gpu_memory_utilization: Annotated[Real, Field(gt=0, le=1)] = 0.9

    @field_validator("block_size")
    @classmethod
    def _check_power_of_two(cls, value: int) -> int:
        if not 16 <= value <= 1024 or value & (value - 1):
            raise ValueError(f"expected a power of two from 16 to 1024, got {excerpt(value)}")
        return value


class MemoryConfig(Section):
    """GPU memory besides weights and KV cache.

    graphs: bytes for the CUDA graphs and their memory pool, reserved before the KV cache is sized.
        The least useful buckets that do not fit are left out. `auto` captures all buckets, in the
        memory that `cache.gpu_memory_utilization` leaves free. Has no effect on a CPU.
    """

    graphs: Bytes | Auto = "auto"


class BucketsConfig(Section):
    """The static shapes to compile. A batch runs in the smallest bucket that holds it.

    decode: sequences per decode step, a list of sizes. `auto` derives them from `max_num_seqs`,
        e.g. 1, 4, 16, 64. `max_num_seqs` is always added, except to an empty list; without decode
        buckets, decoding runs in the prefill buckets, and with a single one of those a request
        gives the same bits whatever runs beside it.
    prefill: tokens per prefill step, a list of sizes. `auto` derives them from
        `max_num_batched_tokens`, e.g. 64, 256, 1024, 2048. `max_num_batched_tokens` is always
        added, except to an empty list; without prefill buckets, prefill runs eagerly.
    growth: ratio of each `auto` size to the one before, at least 1.05. A smaller ratio pads less
        and compiles more buckets.
    samplers: which samplers to compile for each size. `greedy`; `random`, with temperature and
        seed; `full`, all of `SamplingParams`; `scoring`, also log-probabilities of the prompt.
        Each supports what those before it do, at a higher cost; a batch that none supports runs
        eagerly. `auto` is greedy and full.
    """

    decode: list[NumSeqs] | Auto = "auto"
    prefill: list[NumTokens] | Auto = "auto"
    growth: Annotated[Real, Field(ge=1.05)] = 4.0
    samplers: Annotated[list[Sampler], Field(min_length=1)] | Auto = "auto"

    def listed_samplers(self) -> list[Sampler]:
        """Return the samplers to compile, in order of increasing cost."""
        listed: list[Sampler] = ["greedy", "full"] if self.samplers == "auto" else self.samplers
        return [sampler for sampler in get_args(Sampler) if sampler in listed]


# The keys that each `compile.level` sets.
LEVELS: dict[int, dict[str, Any]] = {
    0: {"dispatch": "eager"},
    1: {"capture": "lazy"},
    2: {},
    3: {"options": {"max_autotune": True, "coordinate_descent_tuning": True}},
}


class CompileConfig(Section):
    """How steps are compiled and launched.

    level: a preset for the other keys of this section, which override it. 0 compiles nothing; 1
        serves at once and compiles buckets while it serves; 2 compiles all buckets first; 3 also
        tunes kernels by timing their variants, which can take minutes.
    dispatch: `direct` compiles ahead of time and replays CUDA graphs (or C++ on a CPU); `torch`
        calls `torch.compile(mode="reduce-overhead")`; `eager` compiles nothing.
    artifact: directory in which compiled buckets are saved and from which they are loaded at the
        next start. `auto` is one in the cache directory ($COMPILED_LLM_CACHE, or
        ~/.cache/compiled_llm); `off` saves nothing. Only with `dispatch: direct`, and not with
        `dump`.
    cache_limit: bytes of all artifacts in the cache directory. Beyond it, the least recently used
        are removed.
    capture: `start` compiles and captures all buckets before the first request. `lazy` serves at
        once, eagerly or in the next larger bucket that is ready, and captures buckets between
        steps, those in most demand first.
    dump: directory for each pass's graph before and after it. `null` writes none.
    options: Inductor options, such as `coordinate_descent_tuning: true`.
    processes: processes that compile buckets in parallel, where an artifact is saved. 0 compiles
        in the engine's own process. `auto` is one less than the number of cores, at most 16; it is
        0 with fewer than 4 cores and on a GPU, where parallel compilation is untested.
    """

    level: Annotated[Literal[0, 1, 2, 3], BeforeValidator(parse_integer)] = 2
    dispatch: Literal["direct", "torch", "eager"] = "direct"
    artifact: Literal["auto", "off"] | FilePath = "auto"
    cache_limit: Bytes = 10 * 2**30
    capture: Literal["start", "lazy"] = "start"
    dump: FilePath | None = None
    options: dict[str, JsonValue] = {}
    processes: Annotated[Integer, Field(ge=0, le=1024)] | Auto = "auto"

    @model_validator(mode="before")
    @classmethod
    def _apply_level(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        level = values.get("level")
        if not isinstance(level, int | float) or level not in LEVELS:
            return values  # no level, or one that the field's own validation refuses
        preset, options = LEVELS[int(level)], values.get("options")
        if isinstance(options, dict) and "options" in preset:
            values = {**values, "options": {**preset["options"], **options}}
        return {**preset, **values}

    @field_validator("artifact", mode="before")
    @classmethod
    def _read_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads off as false


class Config(Section):
    """The settings of one engine.

    passes: passes to switch `on` or `off`. Those that are named run first, in the order given; the
        others follow in their usual order, all of them on.
    strict: raise `StrictError` for a fallback to eager, a skipped graph, a recompilation or a
        second recording, instead of continuing.
    verify: at the start, compare each bucket with eager on random batches; a bucket that differs
        is not used.
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
    def _check_passes(cls, value: dict[str, bool]) -> dict[str, bool]:
        return resolve_pass_names(value)

    @model_validator(mode="after")
    def _check_strict(self) -> Self:
        if self.strict and self.compile.dispatch == "eager":
            raise ValueError(
                "strict forbids eager steps, but with compile.dispatch=eager all steps are eager: "
                "drop one of the two"
            )
        if self.strict and self.compile.capture == "lazy":
            raise ValueError(
                "strict forbids eager steps, but with compile.capture=lazy the first steps are "
                "eager: drop one of the two"
            )
        return self

    def pass_order(self) -> list[str]:
        """Return the names of the passes that are on, in the order in which they run."""
        names = [*self.passes, *(name for name in known_passes() if name not in self.passes)]
        return [name for name in names if self.passes.get(name, True)]
