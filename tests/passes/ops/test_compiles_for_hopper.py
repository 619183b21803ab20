"""Compilation of the attention kernels for Hopper, which needs no GPU.

Without a GPU other tests run the kernels in Triton's interpreter, which does not show whether
Triton and ptxas accept them.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from passes.ops.decode_attention import _decode_attention_kernel
from passes.ops.prefill_attention import _prefill_attention_kernel

HOPPER = GPUTarget("cuda", 90, 32)
MAX_SHARED_MEMORY = 227 * 1024  # bytes per block
BFLOAT16, FLOAT32, INT32 = "*bf16", "*fp32", "*i32"
# Types of arguments by name; all others are i32.
TYPES = {
    **dict.fromkeys(("out", "q", "k_cache", "v_cache", "sinks"), BFLOAT16),
    **dict.fromkeys(("partial_out", "partial_ml", "slopes"), FLOAT32),
    **dict.fromkeys(("block_table", "query_start", "seq_lens", "split_counters"), INT32),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}
HEADS = {"H": 16, "G": 8, "D": 128, "E": 128, "PAGE": 16}
TILES = {"TILE_D": 128, "TILE_E": 128, "TILE_K": 64, "STAGES": 2}
KERNELS = {
    "decode": (
        _decode_attention_kernel,
        {"TILE_M": 16, "TILE_S": 16, "UNROLL": 8, "USE_PDL": True},
    ),
    "prefill": (_prefill_attention_kernel, {"TILE_M": 64, "TILE_Q": 32, "SEARCH_STEPS": 4}),
}
OPTIONS = {
    "plain": {"WINDOW": 0, "HAS_SINKS": False, "HAS_SOFTCAP": False, "HAS_SLOPES": False},
    "slopes": {"WINDOW": 0, "HAS_SINKS": False, "HAS_SOFTCAP": False, "HAS_SLOPES": True},
    "all": {"WINDOW": 24, "HAS_SINKS": True, "HAS_SOFTCAP": True, "HAS_SLOPES": True},
    "chunks": {"WINDOW": -64, "HAS_SINKS": True, "HAS_SOFTCAP": False, "HAS_SLOPES": False},
}


def test_all_compile(tmp_path: Path) -> None:
    """Compile in another process, because this one imports kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.passes.ops.test_compiles_for_hopper"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.split() == [f"{name}-{option}" for name in KERNELS for option in OPTIONS]


def _compile(name: str, option: str) -> None:
    kernel, tiles = KERNELS[name]
    constants: dict[str, Any] = {**HEADS, **TILES, **tiles, **OPTIONS[option]}
    for tensor, flag in (("sinks", "HAS_SINKS"), ("slopes", "HAS_SLOPES")):
        if not constants[flag]:
            constants[tensor] = None
    signature = {
        argument: "constexpr" if argument in constants else TYPES.get(argument, "i32")
        for argument in kernel.arg_names
    }
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=HOPPER)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared < MAX_SHARED_MEMORY


if __name__ == "__main__":
    for kernel_name in KERNELS:
        for option_name in OPTIONS:
            _compile(kernel_name, option_name)
            print(f"{kernel_name}-{option_name}")
