"""The registry of torch's private APIs that the engine patches or calls.

Each record gives the target, the reason, the upstream issue where there is one, and the versions
of torch it was tried with. Code in this package reaches the API through its record: `get()` checks
it on first use, and `patch()` replaces it. The records of the passes and ops are in
`passes.torch_internals`; `INTERNALS` lists all of them.
"""

from passes.torch_internals import INTERNALS as INTERNALS_OF_PASSES
from passes.torch_internals import TorchInternal

# Tracing.

PATCH_METHOD = TorchInternal(
    target="torch.fx._symbolic_trace:_Patcher.patch_method",
    reason="keep the patches of a trace out of other threads",
    parameters=("self", "cls", "name", "new_fn", "deduplicate"),
)
FULLGRAPH_CAPTURE = TorchInternal(
    target="torch._dynamo.convert_frame:fullgraph_capture",
    reason="compute the digest of a traced graph",
    parameters=(
        "mod",
        "args",
        "kwargs",
        "constraints",
        "_is_export_deprecated_do_not_use",
    ),
)
CUDA_DEVICE_GUARD = TorchInternal(
    target="torch._C:_ensureCUDADeviceGuardSet",
    reason="create the CUDA device guard of a machine without a GPU in the importing thread",
)
GLOBAL_FORWARD_HOOKS = TorchInternal(
    target="torch.nn.modules.module:_global_forward_hooks",
    reason="find hooks that change what a model computes",
)
GLOBAL_FORWARD_PRE_HOOKS = TorchInternal(
    target="torch.nn.modules.module:_global_forward_pre_hooks",
    reason="find hooks that change what a model computes",
)

# Ahead-of-time compilation.

AOT_COMPILED_FUNCTION = TorchInternal(
    target="torch._dynamo.aot_compile:AOTCompiledFunction",
    reason="save and load compiled steps and call them without guards",
    members=("serialize", "deserialize", "disable_guard_check"),
)
CACHE_KEY_TAG = TorchInternal(
    target="torch.compiler.config:cache_key_tag",
    reason="keep code generated with these patches apart in Inductor's cache",
)
LIST_OPTIONS = TorchInternal(
    target="torch._inductor:list_options",
    reason="check the names in compile.options",
    parameters=(),
)
COMPILATION_TIMES = TorchInternal(
    target="torch._dynamo.utils:compilation_time_metrics",
    reason="tell the seconds of tracing and autotuning from those of compilation",
)
COUNTERS = TorchInternal(
    target="torch._dynamo.utils:counters",
    reason="count recompilations and skipped CUDA graphs",
)
STORAGE_FROM_POINTER = TorchInternal(
    target="torch._C:_construct_storage_from_data_pointer",
    reason="give a process that only compiles tensors at the addresses of the engine's tensors",
)

# Inductor's C++ and its cache.

CHECK_BUILD = TorchInternal(
    target="torch._inductor.cpu_vec_isa:VecISA.check_build",
    reason="look up in the cache directory which vector instructions the C++ compiler supports",
    parameters=("self", "code"),
)
BUILD_FINGERPRINT = TorchInternal(
    target="torch._inductor.cpu_vec_isa:_get_isa_dry_compile_fingerprint",
    reason="identify the C++ compiler and its flags",
    parameters=("isa_flags",),
)
AVX2_FLAGS = TorchInternal(
    target="torch._inductor.cpu_vec_isa:VecAVX2._arch_flags",
    reason="compile AVX2 code without AVX-512, which GCC 12 miscompiles",
)
SELECT_TILING = TorchInternal(
    target="torch._inductor.codegen.cpp:TilingSelect.select_tiling",
    reason="leave loops scalar whose vectorized sums would be stored past the end of a row",
    parameters=("self", "fn_list", "var_sizes_list"),
    issue="https://github.com/pytorch/pytorch/issues/196681",
)
HEADER_DIR = TorchInternal(
    target="torch._inductor.codecache:_HEADER_DIR",
    reason="keep precompiled headers in a directory that other users cannot write to",
)
HEADER_LOCK_DIR = TorchInternal(
    target="torch._inductor.codecache:_HEADER_LOCK_DIR",
    reason="keep the locks of precompiled headers in a directory that others cannot write to",
)
DEFAULT_CACHE_DIR = TorchInternal(
    target="torch._inductor.runtime.cache_dir_utils:default_cache_dir",
    reason="tell a cache directory that the user chose from Inductor's default",
    parameters=(),
)
CACHE_DIR = TorchInternal(
    target="torch._inductor.runtime.cache_dir_utils:cache_dir",
    reason="find the libraries that Inductor compiled",
    parameters=(),
)

# CUDA graph trees.

TREES_OF_THREAD = TorchInternal(
    target="torch._inductor.cudagraph_trees:local",
    reason="give a thread that torch did not prepare CUDA graph trees of its own",
)
GET_MANAGER = TorchInternal(
    target="torch._inductor.cudagraph_trees:get_manager",
    reason="find the recording of a step",
    parameters=("device_index", "create_if_none_exists"),
)
TREE_MANAGER = TorchInternal(
    target="torch._inductor.cudagraph_trees:CUDAGraphTreeManager",
    reason="find and drop recordings and recover from a failed capture",
    members=(
        "current_node",
        "roots",
        "graph",
        "stream",
        "cuda_graphs_thread_pool",
        "debug_fail_counter",
        "clear_current_path_state_and_set_to_none",
    ),
)
GRAPH_NODE = TorchInternal(
    target="torch._inductor.cudagraph_trees:CUDAGraphNode",
    reason="replay a recording without the checks of the tree",
    members=("graph", "non_static_input_idx", "cuda_graphs_pool"),
)
END_ALLOCATE_TO_POOL = TorchInternal(
    target="torch._C:_cuda_endAllocateToPool",
    reason="end the allocations of a capture that failed",
)
RELEASE_POOL = TorchInternal(
    target="torch._C:_cuda_releasePool",
    reason="release the memory pool of a capture that failed",
)

INTERNALS = (
    *(value for value in list(vars().values()) if isinstance(value, TorchInternal)),
    *INTERNALS_OF_PASSES,
)
