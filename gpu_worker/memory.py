"""How much memory there is for the KV cache and the adapters, and how arrays get to a device."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.host_memory import free_host_bytes
from protocol.runtime.settings import Settings

GiB = 1 << 30


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device; on a CPU at most what the limit of this container leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Memory of one worker's caches on its device, in bytes."""

    kv: int  # keys, values, and states of layers that keep some
    pool: int  # rows of resident adapters
    extra: int  # bytes for changes of adapters beyond rows


def share_out(room: int, settings: Settings, *, on_cpu: bool) -> CacheBytes:
    """Share memory out among the caches, where settings leave it open.

    room: bytes. On a CPU, which has other uses for its memory, the caches take at most a quarter for keys and values,
    a quarter for adapters and a twentieth for what these change else, 2 GiB each. On a GPU they take all of it, 28 % of
    it and 16 GiB at most for adapters, 6 % and 8 GiB for what they change else.
    """
    if on_cpu:
        kv, pool, extra = (min(int(room * part), 2 * GiB) for part in (0.25, 0.25, 0.05))
        return CacheBytes(
            settings.kv_cache_bytes or kv, settings.adapter_pool_bytes or pool, settings.adapter_extra_bytes or extra
        )
    pool = settings.adapter_pool_bytes or min(int(room * 0.28), 16 * GiB)
    extra = settings.adapter_extra_bytes or min(int(room * 0.06), 8 * GiB)
    return CacheBytes(settings.kv_cache_bytes or room - pool - extra, pool, extra)


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
    """Return an array as a host tensor for asynchronous copies to a device: page-locked for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of an array on a device. The host does not wait; later launches see the copy."""
    return host_tensor(array, device).to(device, non_blocking=True)


class Arriving:
    """Asynchronous copies of tensors to the host, launched after the kernels that compute them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: of one device; later launches may change or free them."""
        self._event: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if tensors and tensors[0].device.type == "cuda":
            self._tensors = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
            for to, source in zip(self._tensors, tensors, strict=True):
                to.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Wait until they are here. Others may use the interpreter meanwhile."""
        if self._event is not None:
            self._event.synchronize()

    def arrays(self) -> list[np.ndarray]:
        """Return the tensors' contents, as soon as they are here."""
        self.wait()
        return [one.numpy() for one in self._tensors]
