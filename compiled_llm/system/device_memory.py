"""Used and free memory of a device, in bytes."""

import psutil
import torch


def used_bytes(device: torch.device) -> int:
    """Return the memory in use: of the whole GPU, or of this process on a CPU."""
    if device.type != "cuda":
        return int(psutil.Process().memory_info().rss)
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
