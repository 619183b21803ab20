"""Passes over graphs made by `torch.export`."""
