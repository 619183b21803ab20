"""Pickle objects without the contents of their large tensors.

The result is for a process that only traces and compiles. Unpickled tensors have the same shapes,
strides, alignment and shared storages as the originals, but no memory of their own: on a GPU they
have the addresses of the original process, which must not be read or written, and on a CPU their
pages are never touched. Small tensors and tensor subclasses are pickled with their contents. CUDA
events and streams become None.
"""

import io
import pickle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compiled_llm.system.torch_patches import STORAGE_FROM_POINTER

_MAX_CONTENT_BYTES = 2**16  # contents of larger storages are left out


class _Tensor(NamedTuple):
    identity: int
    storage: int
    is_parameter: bool
    dtype: torch.dtype
    device: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Storage(NamedTuple):
    address: int
    nbytes: int
    content: bytes | None


def dumps(value: object) -> bytes:
    """Pickle an object; raises what `pickle.dumps` raises."""
    body = io.BytesIO()
    pickler = _Pickler(body, pickle.HIGHEST_PROTOCOL)
    pickler.dump(value)
    return pickle.dumps((pickler.storages, body.getvalue()))


def loads(content: bytes) -> Any:
    """Unpickle the result of `dumps`, in any process."""
    storages, body = pickle.loads(content)
    return _Unpickler(io.BytesIO(body), storages).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: dict[int, _Storage] = {}

    def reducer_override(self, value: object) -> Any:
        return (_none, ()) if isinstance(value, (torch.Event, torch.Stream)) else NotImplemented

    def persistent_id(self, value: object) -> _Tensor | None:
        if type(value) not in (Tensor, nn.Parameter):
            return None
        assert isinstance(value, Tensor)
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            small = storage.nbytes() <= _MAX_CONTENT_BYTES
            content = bytes(storage.cpu().tolist()) if small else None
            self.storages[key] = _Storage(storage.data_ptr(), storage.nbytes(), content)
        return _Tensor(
            identity=id(value),
            storage=key,
            is_parameter=isinstance(value, nn.Parameter),
            dtype=value.dtype,
            device=str(value.device),
            shape=tuple(value.shape),
            stride=value.stride(),
            offset=int(value.storage_offset()),
        )


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, described: dict[int, _Storage]) -> None:
        super().__init__(file)
        self._described = described
        self._storages: dict[int, Any] = {}
        self._tensors: dict[int, Tensor] = {}

    def persistent_load(self, described: _Tensor) -> Tensor:
        if described.identity not in self._tensors:
            self._tensors[described.identity] = self._make(described)
        return self._tensors[described.identity]

    def _make(self, described: _Tensor) -> Tensor:
        key, device = described.storage, torch.device(described.device)
        if key not in self._storages:
            self._storages[key] = _make_storage(self._described[key], device)
        tensor = torch.empty(0, dtype=described.dtype, device=device)
        tensor.set_(self._storages[key], described.offset, described.shape, described.stride)
        return nn.Parameter(tensor, requires_grad=False) if described.is_parameter else tensor


def _none() -> None:
    """Stand in for an object that exists in one process only."""


def _make_storage(described: _Storage, device: torch.device) -> Any:
    if described.content is not None:
        content = list(described.content)
        return torch.tensor(content, dtype=torch.uint8, device=device).untyped_storage()
    if device.type == "cuda":
        return STORAGE_FROM_POINTER.get()(described.address, device, described.nbytes)
    return torch.UntypedStorage(described.nbytes)
