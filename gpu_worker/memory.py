"""Device memory: its division between KV cache and adapters, memory ahead of use, copies between host and device."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.host_memory import free_host_bytes
from protocol.runtime.settings import Settings

GiB = 1 << 30

MIN_AHEAD_BYTES = 8 << 20
"""Memory ahead of use that each cache on a CPU has at least; otherwise as much as its used units take."""

PIECE_BYTES = 1 << 20
"""Bytes of memory provided at once, or one unit's if that is larger: 0.2 to 2 ms, by which a request may be delayed."""

_MADV_POPULATE_WRITE = 23  # not in Python's `mmap`; of Linux 5.14 and newer, others refuse it
_libc = ctypes.CDLL(None)


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


class MemoryAhead:
    """Has the system provide memory for a cache on a CPU before it is used, at times when no step runs.

    Units of the cache are used in the order of their numbers. The first write to a page of 4 KiB takes 1.3 µs, and 7 µs
    where the host of a virtual machine must find the memory: up to a fifth of a prompt step (docs/measured/engine.md).
    """

    def __init__(
        self, tensors: Sequence[Tensor], rows: int = 1, free_bytes: Callable[[], int] = free_host_bytes
    ) -> None:
        """tensors: [units * rows, …] from `zeros`, each row contiguous; those of other devices are left alone.

        rows: of a tensor per unit. free_bytes: returns the free bytes of the host.
        """
        self._tensors = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.numel()]  # kept mapped
        self._places = [(one.data_ptr(), one.stride(0) * one.itemsize * rows) for one in self._tensors]
        self._num_units = min((len(one) // rows for one in self._tensors), default=0)
        self._unit_bytes = max(1, sum(size for _, size in self._places))
        self._free_bytes = free_bytes
        self.num_provided = 0  # units that have memory, or had it provided by their use

    def extend(self, num_used: int) -> bool:
        """Have memory provided for a few more units if they are wanted; return whether it was.

        As many are wanted ahead of use as are used, but none while the host has less free memory than the whole cache
        takes, nor once the system has refused. num_used: the number of units ever used.
        """
        self.num_provided = max(self.num_provided, num_used)
        wanted = min(num_used + max(num_used, MIN_AHEAD_BYTES // self._unit_bytes), self._num_units)
        num = min(wanted - self.num_provided, max(1, PIECE_BYTES // self._unit_bytes))
        if num <= 0 or self._free_bytes() < self._unit_bytes * self._num_units:
            return False
        for start, size in self._places:
            first = (start + self.num_provided * size) // mmap.PAGESIZE * mmap.PAGESIZE
            end = start + (self.num_provided + num) * size
            if _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_POPULATE_WRITE):
                self._num_units = 0
                return False
        self.num_provided += num
        return True


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
