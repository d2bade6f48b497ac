"""Device memory: its division between KV cache and adapters, and copies between host and device."""

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
    """Return the free bytes of a device; on a CPU limited to what this container may still use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Memory of one worker's caches on its device, in bytes."""

    kv: int  # keys, values, and states of layers that keep some
    pool: int  # rows of resident adapters
    extra: int  # other changes of resident adapters (extras)


def share_out(room: int, settings: Settings, *, on_cpu: bool) -> CacheBytes:
    """Divide memory among the caches whose size the settings leave open.

    room: bytes. A CPU has other uses for its memory: at most a quarter goes to keys and values, a quarter to adapter
    rows and a twentieth to extras, each at most 2 GiB. On a GPU the caches take everything: at most 28 % and 16 GiB for
    adapter rows, 6 % and 8 GiB for extras, the rest for keys and values.
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
    """Return a tensor of zeros.

    On a CPU, pages take memory only once written; `torch.zeros` would touch all of them.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(*shape, dtype=dtype, device=device)
    # Private pages: the first write to a page of shared memory takes 1.5 times as long.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = np.frombuffer(mmap.mmap(-1, num_bytes, **flags), np.uint8)
    return torch.from_numpy(pages).view(dtype).view(*shape)


def host_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a host tensor from which asynchronous copies can be made: page-locked for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of an array on a device. The host does not wait; later launches see the copy."""
    return host_tensor(array, device).to(device, non_blocking=True)


class Arriving:
    """Asynchronous copies of tensors to the host, launched after the kernels that compute them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: all on one device; later launches may change or free them."""
        self._event: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if tensors and tensors[0].device.type == "cuda":
            self._tensors = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
            for to, source in zip(self._tensors, tensors, strict=True):
                to.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Wait until the copies are complete, with the GIL released."""
        if self._event is not None:
            self._event.synchronize()

    def arrays(self) -> list[np.ndarray]:
        """Wait for the copies and return the tensors' contents."""
        self.wait()
        return [one.numpy() for one in self._tensors]
