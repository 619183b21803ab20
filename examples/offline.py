"""Generate completions for a batch of prompts with the default model, SmolLM2-135M-Instruct.

    python examples/offline.py [--config CONFIG.yaml]

Prints each prompt with its completion, the number of generated tokens and the finish reason, then
the answer to a conversation. The first run downloads the model (93 MB) and compiles two buckets;
later runs load both from the cache directory.
"""

import argparse
from pathlib import Path

from compiled_llm import CompiledLLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are",
]
CONVERSATION = [{"role": "user", "content": "What is the capital of Italy?"}]


def main() -> None:
    """Generate for all prompts in one batch, then answer the conversation."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("smollm2.yaml"))
    config = parser.parse_args().config
    params = SamplingParams(temperature=0, max_tokens=24)

    with CompiledLLM.from_pretrained(config=config) as llm:
        for output in llm.generate(PROMPTS, params):
            completion = output.outputs[0]
            print(f"prompt:     {output.prompt}")
            print(f"completion: {completion.text!r}")
            print(f"            {len(completion.token_ids)} tokens, {completion.finish_reason}\n")

        (answer,) = llm.chat(CONVERSATION, params)
        print(f"question:   {CONVERSATION[0]['content']}")
        print(f"answer:     {answer.text}")


if __name__ == "__main__":
    main()
