"""Used and free memory: of the process and the machine on a CPU, of the device on a GPU."""

import mmap

import pytest
import torch

from compiled_llm.system.device_memory import free_bytes, used_bytes


def test_of_a_cpu() -> None:
    size = 2**26
    before = used_bytes(torch.device("cpu"))
    with mmap.mmap(-1, size) as held:  # the heap might reuse memory that the process holds already
        held.write(b"x" * size)
        assert used_bytes(torch.device("cpu")) - before > size // 2
        assert size < free_bytes(torch.device("cpu"))


def test_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    assert used_bytes(torch.device("cuda")) == 700
    assert free_bytes(torch.device("cuda")) == 300
