"""Private APIs of torch and Triton: a record for each one that is patched or called, with a check.

Private APIs change without notice between releases. Each one is used through a `TorchInternal`, so
that a change fails with its name and the remedy, and not with wrong tokens.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any
from unittest import mock

_checked: set["TorchInternal"] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchInternal:
    """A private function, class or value.

    Attributes:
        target: where it is, as "module:qualified.name".
        reason: what it is used for; completes "is used to ...".
        parameters: the names of its parameters in order; None where it has no signature.
        members: the attributes that a class must have, or that its `__init__` must assign.
        issue: the upstream issue that requires the patch.
        versions: the versions of its package that it was tried with.
    """

    target: str
    reason: str
    parameters: tuple[str, ...] | None = None
    members: tuple[str, ...] = ()
    issue: str | None = None
    versions: tuple[str, ...] = ("2.11.0",)

    def get(self) -> Any:
        """Return the API; the first call checks it. Raises what `check` raises."""
        if self not in _checked:
            self.check()
            _checked.add(self)
        owner, name = self._locate()
        return getattr(owner, name)

    def patch(self, replacement: object) -> AbstractContextManager[object]:
        """Return a context manager that puts `replacement` in place of the API."""
        self.get()
        owner, name = self._locate()
        return mock.patch.object(owner, name, replacement)

    def check(self) -> None:
        """Compare the installed API with this record.

        Raises:
            RuntimeError: it is missing, or has other parameters or members.
        """
        try:
            owner, name = self._locate()
            value = getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise self._changed("the API to exist", str(error)) from error
        if self.parameters is not None:
            found = _parameters(value)
            if found != self.parameters:
                raise self._changed(
                    f"parameters ({', '.join(self.parameters)})",
                    "no signature" if found is None else f"({', '.join(found)})",
                )
        missing = [name for name in self.members if name not in _members(value)]
        if missing:
            raise self._changed(f"members {', '.join(self.members)}", f"no {', '.join(missing)}")

    def _locate(self) -> tuple[Any, str]:
        """Return the object that holds the API, and the API's name there."""
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner: Any = import_module(module)
        for attribute in owners:
            owner = getattr(owner, attribute)
        return owner, name

    def _changed(self, expected: str, found: str) -> RuntimeError:
        package = self.target.partition(".")[0]
        known = " or ".join(f"{package}=={number}" for number in self.versions)
        return RuntimeError(
            f"{self.target} has changed in {package} {version(package)}: expected {expected}, "
            f"found {found}. It is used to {self.reason}. Install {known}, or adapt the code that "
            "uses it and its record."
        )


def _parameters(value: Callable[..., object]) -> tuple[str, ...] | None:
    try:
        return tuple(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        return None


def _members(value: Any) -> set[str]:
    """Return the attributes of an object; of a class, also those that `__init__` reads or sets."""
    names = set(dir(value))
    if isinstance(value, type):
        initializers = (vars(kind).get("__init__") for kind in value.__mro__)
        for initializer in initializers:
            names.update(getattr(getattr(initializer, "__code__", None), "co_names", ()))
    return names


_TRITON = ("3.6.0",)

PDL_WAIT = TorchInternal(
    target="torch._inductor.codegen.triton:TritonKernel._handle_pdl_before_access",
    reason="make each generated kernel wait for the kernel before it",
    parameters=("self", "wait_buffer", "dependencies", "consider_reads"),
)
TRITON_KERNEL = TorchInternal(
    target="torch._inductor.codegen.triton:TritonKernel",
    reason="write the wait of programmatic dependent launch into generated kernels",
    members=("_enable_pdl_codegen", "GDC_WAIT", "inside_reduction", "range_trees", "body"),
)
REGISTER_LOWERING = TorchInternal(
    target="torch._inductor.lowering:register_lowering",
    reason="write a value that several kernels read to memory once",
    parameters=(
        "aten_fn",
        "broadcast",
        "type_promotion_kind",
        "convert_input_to_bool",
        "lowering_dict",
    ),
)
CUSTOM_GRAPH_PASS = TorchInternal(
    target="torch._inductor.custom_graph_pass:CustomGraphPass",
    reason="run the passes on Inductor's graph and add them to the key of its cache",
    members=("__call__", "uuid"),
)
CPP_CODE_CACHE = TorchInternal(
    target="torch._inductor.codecache:CppCodeCache",
    reason="compile the C++ kernels of the CPU",
    members=("load",),
)
JIT_RUN = TorchInternal(
    target="triton.runtime.jit:JITFunction.run",
    reason="compile kernels without launching them",
    parameters=("self", "args", "grid", "warmup", "kwargs"),
    versions=_TRITON,
)
LAUNCHER_CACHE = TorchInternal(
    target="triton.runtime.build:get_cache_manager",
    reason="find the files of a kernel's launcher in Triton's cache",
    parameters=("key",),
    versions=_TRITON,
)
FILE_CACHE = TorchInternal(
    target="triton.runtime.cache:FileCacheManager",
    reason="read the files of a kernel from Triton's cache",
    members=("cache_dir", "get_file", "put", "get_group", "put_group"),
    versions=_TRITON,
)

INTERNALS = (
    PDL_WAIT,
    TRITON_KERNEL,
    REGISTER_LOWERING,
    CUSTOM_GRAPH_PASS,
    CPP_CODE_CACHE,
    JIT_RUN,
    LAUNCHER_CACHE,
    FILE_CACHE,
)
