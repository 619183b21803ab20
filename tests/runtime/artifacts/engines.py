"""Engines on the tiny checkpoint, started with an artifact."""

from pathlib import Path

from torch._inductor.utils import fresh_cache

from compiled_llm import CompiledLLM
from compiled_llm.report.report import Report
from tests.helpers.tiny_models import greedy, prompt_of, small_config

PROMPTS = [prompt_of(5), prompt_of(20)]


def run(artifact: Path, expected: list[list[int]], checkpoint: Path, **changes: object) -> Report:
    """Start an engine on the artifact with empty compiler caches, and check its tokens.

    Returns:
        Its report.
    """
    config = small_config(
        compile={"artifact": str(artifact)},
        model={"name": str(checkpoint), "dtype": "float32"},
        **changes,
    )
    with fresh_cache(), CompiledLLM.from_pretrained(config=config, progress=False) as llm:
        assert greedy(llm, PROMPTS, 10) == expected
        report = llm.report()
        assert not report.fallbacks
        return report
