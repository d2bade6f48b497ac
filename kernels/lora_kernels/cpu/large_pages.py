"""Memory for packed weights, in pages of 2 MiB where the system provides them on request.

Every step reads every weight. With pages of 4 KiB a core needs an address translation every 64 cache lines, and its
prefetcher stops at each page boundary.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 2 << 20
_CHUNK = 32 * PAGE  # mapped at a time; untouched pages take no memory
_ALIGNMENT = 64
_QUICK_S = 0.0005  # a free page takes a fifth of this; one that needs compaction, or that a host must bring back, 5 ms
_libc = ctypes.CDLL(None)


class LargePages:
    """Allocates parts of large mappings. A mapping is unmapped once none of its parts is in use."""

    def __init__(self, patience_s: float = 0.25) -> None:
        """patience_s: CPU seconds for pages that are not free; then small ones are used, lest start-up take seconds."""
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._patience_s = patience_s

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized contiguous tensor aligned to a cache line. Raises OSError if memory is exhausted."""
        num_bytes = math.prod(shape) * dtype.itemsize
        taken = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            if taken > _CHUNK:
                memory = _map(taken)
            else:
                if taken > len(self._rest):
                    self._rest = _map(_CHUNK)
                memory, self._rest = self._rest[:taken], self._rest[taken:]
            self._fill(memory)
        return memory[:num_bytes].view(dtype).view(*shape)

    def _fill(self, memory: Tensor) -> None:
        """Back a part with large pages, one after another, within the CPU time allowed."""
        for first in range(-memory.data_ptr() % PAGE, len(memory), PAGE):
            if self._patience_s <= 0 or not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux only
                return
            begin = time.thread_time()
            place = ctypes.c_void_p(memory.data_ptr() + first)
            _libc.madvise(place, ctypes.c_size_t(PAGE), mmap.MADV_HUGEPAGE)  # refused by kernels without large pages
            memory[first] = 0
            self._patience_s -= max(0.0, time.thread_time() - begin - _QUICK_S)


weights = LargePages()
"""The process's packed weights, allocated side by side, so that few pages are only partly used."""


def _map(num_bytes: int) -> Tensor:
    """Return uint8 [num_bytes, rounded up to whole pages] of newly mapped memory, aligned to a page."""
    size = -(-num_bytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with torch.inference_mode(False):  # otherwise only inference mode could write to it
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        return whole[-whole.data_ptr() % PAGE :][:size]
