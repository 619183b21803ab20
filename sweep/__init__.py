"""Every causal LM that transformers knows, tiny and random, on our engine and on transformers' own eager generation."""
