"""Custom ops: a reference in plain PyTorch each, Triton kernels for a GPU, C++ for a CPU."""
