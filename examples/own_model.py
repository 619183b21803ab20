"""Compile a transformers model that the program holds; random weights, so nothing is downloaded.

    python examples/own_model.py

Prints the greedy tokens of the compiled model beside those of `model.generate`, which are equal,
the number of eager steps, and the attention implementation that `close()` restores.
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from compiled_llm import CompiledLLM, SamplingParams

MODEL = Qwen3Config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.1,
)
# One bucket of 16 tokens serves prompts and decode steps. Nothing is saved for later starts.
CONFIG = {
    "limits": {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 128},
    "buckets": {"decode": [], "prefill": [16], "samplers": ["greedy"]},
    "compile": {"artifact": "off"},
}
PROMPT = [11, 42, 7, 300, 5]
NUM_TOKENS = 12


def main() -> None:
    """Compare the compiled model with transformers' own generation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODEL, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    # Without a tokenizer, prompts are token ids.
    with CompiledLLM(model, config=CONFIG, progress=False) as llm:
        (output,) = llm.generate([PROMPT], params)
        eager_steps = sum(llm.report().fallbacks.values())

    tokens = output.outputs[0].token_ids
    print(f"compiled:     {tokens}")
    print(f"transformers: {expected[0, len(PROMPT) :].tolist()}")
    print(f"equal: {tokens == expected[0, len(PROMPT) :].tolist()}")
    print(f"eager steps: {eager_steps}")
    print(f"attention after close: {model.config._attn_implementation}")


if __name__ == "__main__":
    main()
