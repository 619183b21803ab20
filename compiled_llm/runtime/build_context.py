"""The parts of an engine that every stage of building a bucket uses."""

from dataclasses import dataclass

import torch

from compiled_llm.config.schema import Config
from compiled_llm.models.discovery import AttentionLayer
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.report.report import Report
from compiled_llm.runtime.artifacts.artifact import Artifact
from compiled_llm.runtime.limits import Limits
from compiled_llm.runtime.memory.allocation import Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """What compiling, capturing and verifying a bucket depends on, except the bucket itself.

    Attributes:
        model: the traced model.
        layers: its attention layers.
        memory: the buffers and caches that the steps read and write.
        config: of the engine.
        limits: of the engine's batches.
        artifact: where compiled buckets are saved; None if they are not.
        report: receives phases and warnings.
        just_loaded: whether nothing has changed the model since transformers loaded it; its source
            then tells what it computes.
    """

    model: ServedModel
    layers: list[AttentionLayer]
    memory: Memory
    config: Config
    limits: Limits
    artifact: Artifact | None
    report: Report
    just_loaded: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.device
