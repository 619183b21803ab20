"""Used and free memory: of the process and the machine on a CPU, of the device on a GPU."""

import pytest
import torch

from compiled_llm.system.device_memory import free_bytes, used_bytes


def test_of_a_cpu() -> None:
    before = used_bytes(torch.device("cpu"))
    held = torch.ones(2**26, dtype=torch.uint8)
    assert used_bytes(torch.device("cpu")) - before > 2**25
    assert held.numel() < free_bytes(torch.device("cpu"))


def test_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    assert used_bytes(torch.device("cuda")) == 700
    assert free_bytes(torch.device("cuda")) == 300
