"""Objects in bytes without what their large tensors hold, for a process that only traces and compiles with them.

There such tensors have the same shapes, strides, alignment and shared storages, and no memory: on a GPU their addresses are
those of this process, where the other must not read or write, and on a CPU their pages are never touched. Tensor subclasses
travel whole. Events and streams of a GPU become None.
"""

import io
import pickle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_WHOLE = 2**16  # bytes of a storage up to which it travels with its content


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
    """The bytes of any object that pickle can handle; raises what that raises."""
    body = io.BytesIO()
    pickler = _Pickler(body, pickle.HIGHEST_PROTOCOL)
    pickler.dump(value)
    return pickle.dumps((pickler.storages, body.getvalue()))


def loads(content: bytes) -> Any:
    """What `dumps` was given, in another process."""
    storages, body = pickle.loads(content)
    return _Unpickler(io.BytesIO(body), storages).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: dict[int, _Storage] = {}

    def reducer_override(self, value: object) -> Any:
        return (_nothing, ()) if isinstance(value, (torch.Event, torch.Stream)) else NotImplemented

    def persistent_id(self, value: object) -> _Tensor | None:
        if type(value) not in (Tensor, nn.Parameter):
            return None
        assert isinstance(value, Tensor)
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            content = None if storage.nbytes() > _WHOLE else bytes(storage.cpu().tolist())
            self.storages[key] = _Storage(storage.data_ptr(), storage.nbytes(), content)
        return _Tensor(
            id(value), key, isinstance(value, nn.Parameter), value.dtype, str(value.device), tuple(value.shape), value.stride(),
            int(value.storage_offset()),
        )  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: dict[int, _Storage]) -> None:
        super().__init__(file)
        self._kept, self._storages, self._tensors = storages, dict[int, Any](), dict[int, Tensor]()

    def persistent_load(self, described: _Tensor) -> Tensor:
        if described.identity not in self._tensors:
            self._tensors[described.identity] = self._make(described)
        return self._tensors[described.identity]

    def _make(self, described: _Tensor) -> Tensor:
        key, device = described.storage, torch.device(described.device)
        if key not in self._storages:
            self._storages[key] = _make_storage(self._kept[key], device)
        tensor = torch.empty(0, dtype=described.dtype, device=device)
        tensor.set_(self._storages[key], described.offset, described.shape, described.stride)
        return nn.Parameter(tensor, requires_grad=False) if described.is_parameter else tensor


def _nothing() -> None:
    """What stands for a thing that has a meaning in one process alone."""


def _make_storage(kept: _Storage, device: torch.device) -> Any:
    if kept.content is not None:
        return torch.tensor(list(kept.content), dtype=torch.uint8, device=device).untyped_storage()
    if device.type == "cuda":
        return torch._C._construct_storage_from_data_pointer(kept.address, device, kept.nbytes)
    return torch.UntypedStorage(kept.nbytes)
