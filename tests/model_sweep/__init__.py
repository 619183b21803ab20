"""Sweep over all causal LMs of transformers: each is compared with transformers' own generation."""
