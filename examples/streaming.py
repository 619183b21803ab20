"""Print text while it is generated, with the default model, SmolLM2-135M-Instruct.

    python examples/streaming.py [--config CONFIG.yaml]

Prints the answer to a conversation, piece by piece, then two stories that are generated at the
same time: each step of the engine serves both streams.
"""

import argparse
from itertools import zip_longest
from pathlib import Path

from compiled_llm import CompiledLLM, SamplingParams

CONVERSATION = [{"role": "user", "content": "Name the four seasons."}]
PROMPT = "Once upon a time"


def main() -> None:
    """Stream one conversation, then two sampled completions of one prompt."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("smollm2.yaml"))
    config = parser.parse_args().config

    with CompiledLLM.from_pretrained(config=config) as llm:
        # A piece never ends within a character.
        for text in llm.stream(CONVERSATION, SamplingParams(temperature=0, max_tokens=40)):
            print(text, end="", flush=True)
        print("\n")

        # A seed makes a sampled completion reproducible, whatever else is in the batch.
        streams = [llm.stream(PROMPT, _sampled(seed)) for seed in (1, 2)]
        stories = [PROMPT, PROMPT]
        for pieces in zip_longest(*streams, fillvalue=""):
            stories = [story + piece for story, piece in zip(stories, pieces, strict=True)]
        for number, story in enumerate(stories, start=1):
            print(f"story {number}: {story}\n")


def _sampled(seed: int) -> SamplingParams:
    return SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=24)


if __name__ == "__main__":
    main()
