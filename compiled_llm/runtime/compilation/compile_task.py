"""The task of a worker process: compile buckets into an artifact without running them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo.convert_frame  # imported before the worker forks
import torch._inductor.codegen.triton
import torch._inductor.compile_fx

from compiled_llm.config.schema import Config
from compiled_llm.runtime.artifacts.artifact import Artifact, SavedBucket
from compiled_llm.runtime.artifacts.fingerprint import compiler_settings
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.compilation import weightless_pickle
from compiled_llm.runtime.compilation.compiler import compile_only
from compiled_llm.runtime.compilation.compiler_cache import private_compiler_cache
from compiled_llm.runtime.compilation.pipeline import make_pipeline
from passes.ops.precompile import compile_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileTask:
    """Buckets to compile, and the inputs of their compilation.

    Attributes:
        engine: the model, its attention layers and its memory, by `weightless_pickle.dumps`.
        buckets: in the order in which the engine needs them.
        config: of the engine.
        artifact: the compiled buckets are saved in it.
        processes: number of processes that compile.
        threads: number of compiler threads of each process.
        num_threads: `torch.get_num_threads` of the engine; generated C++ depends on it.
    """

    engine: bytes
    buckets: list[Bucket]
    config: Config
    artifact: Artifact
    processes: int
    threads: int
    num_threads: int

    def load_engine(self) -> Any:
        """Prepare this process and return the unpickled engine.

        Raises:
            RuntimeError: the settings of torch's compiler differ from those of the engine.
        """
        torch.set_num_threads(self.num_threads)
        key = self.artifact.key
        different = key.differences(replace(key, settings=compiler_settings()))
        if different:
            raise RuntimeError(
                "the settings of torch's compiler differ between the engine and the process that "
                f"compiles for it: {', '.join(different)}"
            )
        return weightless_pickle.loads(self.engine)

    @torch.no_grad()
    def compile(self, bucket: Bucket, engine: Any) -> None:
        """Compile a bucket and save it in the artifact; `engine` comes from `load_engine`."""
        model, layers, memory = engine
        pipeline = make_pipeline(self.config, bucket, model, layers)
        options = {"compile_threads": self.threads, **self.config.compile.options}
        with private_compiler_cache():
            step, digest = compile_only(memory.step(model, bucket), pipeline, options)
            saved = SavedBucket(
                step=step,
                passes=pipeline.reports,
                kernels=compile_kernels(pipeline.kernel_calls),
                graph_digest=digest,
            )
            self.artifact.save(str(bucket), saved)
