"""A started engine of one model, from the start until it is closed."""

import gc
import weakref
from contextlib import ExitStack

import torch

from compiled_llm.config.schema import Config
from compiled_llm.engine.engine import Engine
from compiled_llm.engine.output_builder import OutputBuilder
from compiled_llm.engine.processor import RequestProcessor
from compiled_llm.engine.request_runner import RequestRunner, closed_error
from compiled_llm.models.loading import LoadedModel
from compiled_llm.models.vocabulary import num_embeddings, vocab_size
from compiled_llm.report.report import Report
from compiled_llm.runtime.compilation.worker_pool import CompilePool
from compiled_llm.runtime.model_runner import ModelRunner
from compiled_llm.startup import start
from compiled_llm.system.compiler_lock import try_compiler_lock


class Session:
    """Starts an engine, and owns its resources.

    Args:
        loaded: the model and its tokenizer.
        config: configuration of the engine.
        report: report of the start, which the engine continues.
        progress: show the progress of the start on standard error.
        pool: compile workers that have begun already.
        just_loaded: whether transformers has just loaded the model, so that its source code
            describes what it computes.

    Attributes:
        loaded, config: the arguments.
        runner: runs requests; it raises RuntimeError after `close`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: Config,
        report: Report,
        *,
        progress: bool,
        pool: CompilePool | None = None,
        just_loaded: bool = False,
    ) -> None:
        self.loaded = loaded
        self.config = config
        with ExitStack() as resources:
            self._model_runner: ModelRunner | None = start(
                loaded.model,
                config,
                report,
                resources,
                progress=progress,
                pool=pool,
                just_loaded=just_loaded,
            )
            self.runner = _make_runner(loaded, self._model_runner)
            # If nobody calls `close`, the model is restored when this object is collected.
            self._restore_model = weakref.finalize(self, resources.pop_all().close)
            self._restore_model.atexit = False

    @property
    def model_runner(self) -> ModelRunner:
        """The model runner; raises RuntimeError after `close`."""
        if self._model_runner is None:
            raise closed_error()
        return self._model_runner

    def close(self) -> None:
        """Free the caches and graphs, and restore the model's attention. Idempotent.

        Raises:
            RuntimeError: the engine is in use, by a logits processor or in another thread.
        """
        if self._model_runner is None:
            return
        self.runner.check_idle(self._model_runner)
        self.runner.close()
        self._model_runner.save_traffic()
        self._model_runner = None
        self._restore_model()
        if self.loaded.model.device.type == "cuda":
            gc.collect()  # compiled functions and their graphs refer to each other
            with try_compiler_lock() as free:
                if free:  # `empty_cache` raises during the capture of another engine
                    torch.cuda.empty_cache()


def _make_runner(loaded: LoadedModel, model_runner: ModelRunner) -> RequestRunner:
    limits, outputs = model_runner.limits, OutputBuilder(loaded.tokenizer)
    processor = RequestProcessor(
        loaded.tokenizer,
        loaded.model.generation_config,
        max_model_len=limits.max_model_len,
        tokenizer_failure=loaded.tokenizer_failure,
    )
    engine = Engine(
        model_runner,
        vocab_size=vocab_size(loaded.model),
        num_embeddings=num_embeddings(loaded.model),
        decode_token=outputs.decode_token,
    )
    return RequestRunner(engine, processor, outputs, max_requests=2 * limits.max_num_seqs)
