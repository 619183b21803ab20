"""Compile a model from a config into an artifact, and start again from that artifact.

    python examples/compilation_run.py [--config CONFIG.yaml] [--artifact DIR]

The default config describes a tiny Llama with random weights. Prints the phases of both starts,
with their seconds, and how each bucket was made: the first start compiles, the second one loads.
(If the directory already holds the artifact, both load.) An artifact is code: load only those
that you trust.
"""

import argparse
import time
from pathlib import Path

from compiled_llm import CompiledLLM, SamplingParams

PROMPT = [11, 42, 7, 200, 5]


def start(config: Path, artifact: Path) -> list[int]:
    """Start an engine, print how it started, and return the tokens it generates."""
    begin = time.perf_counter()
    with CompiledLLM.from_pretrained(config=config, artifact=artifact, progress=False) as llm:
        print(f"ready after {time.perf_counter() - begin:.2f} s")
        report = llm.report()
        for phase in report.phases:
            print(f"  {phase.name:<24} {phase.seconds:6.2f} s")
        for bucket in report.buckets:
            print(f"  {bucket.bucket}: {'loaded' if bucket.loaded else 'compiled'}")
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        (output,) = llm.generate([PROMPT], params, progress=False)
    return output.outputs[0].token_ids


def main() -> None:
    """Start twice with one artifact directory."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("compilation_run.yaml")
    )
    parser.add_argument("--artifact", type=Path, default=Path("build/tiny-llama-artifact"))
    arguments = parser.parse_args()

    first = start(arguments.config, arguments.artifact)
    print(f"artifact: {sorted(path.name for path in arguments.artifact.iterdir())}\n")
    second = start(arguments.config, arguments.artifact)
    print(f"\nequal tokens: {first == second}")


if __name__ == "__main__":
    main()
