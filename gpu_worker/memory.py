"""How much memory there is for the KV cache and the adapters, and how arrays get to a device."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpu_worker.host_memory import free_host_bytes

GiB = 1 << 30


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device; on a CPU at most what the limit of this container leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


def share(given: int, free: int, fraction: float, most: int) -> int:
    """Return a budget in bytes: `given`, or if that is 0 a fraction of what is free, at most `most`."""
    return given or min(int(free * fraction), most)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. On a CPU they take memory only where they are written; `torch.zeros` would touch all of it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(*shape, dtype=dtype, device=device)
    # Private pages: the first write to a page of shared memory takes half as long again.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = np.frombuffer(mmap.mmap(-1, num_bytes, **flags), np.uint8)
    return torch.from_numpy(pages).view(dtype).view(*shape)


def host_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a host tensor that is copied to a device while the host goes on: page-locked for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of an array on a device. The host does not wait; what is launched there later sees the copy."""
    return host_tensor(array, device).to(device, non_blocking=True)
