"""Free memory of the host. Imports no torch, since the loader's process uses this too."""

from __future__ import annotations

import ctypes
import mmap
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from protocol.wire.errors import Unavailable

_CGROUP = Path("/sys/fs/cgroup")

_LIBRARY = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-[-x]p \S+ \S+ \d+ +/.*\.so[.\d]*\n")
"""Start of a read-only mapping of a shared library (code or constants) in /proc/PID/smaps."""

_MAPPINGS = re.compile(r"^(?=[0-9a-f]+-[0-9a-f]+ )", re.MULTILINE)
_OWN = re.compile(r"^(Anonymous|Swap): +(\d+) kB$", re.MULTILINE)


def free_host_bytes() -> int:
    """Return the free bytes of the host, limited to what this container may still use."""
    return min(psutil.virtual_memory().available, _cgroup_free_bytes())


def give_back_freed() -> None:
    """Return freed heap memory to the system with glibc's `malloc_trim`; does nothing with other allocators.

    After a model is loaded, the allocator holds some 30 MB in small pieces freed by torch and Python.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def let_go_of_libraries() -> None:
    """Drop the resident pages of libraries' code and constants: start-up touches four times as many as steps do.

    They would count toward this process's RSS. Pages that are used again come back from the page cache, at the cost of
    a few hundred page faults. Does nothing except on Linux.
    """
    try:
        smaps = Path("/proc/self/smaps").read_text()
    except OSError:
        return
    madvise = ctypes.CDLL(None).madvise
    for start, end in unchanged_libraries(smaps):
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def unchanged_libraries(smaps: str) -> list[tuple[int, int]]:
    """Return the read-only library mappings, as [start, end), in which every page is the same as in the file.

    smaps: the text of /proc/PID/smaps. Constants into which the dynamic loader has written addresses are not included.
    """
    found: list[tuple[int, int]] = []
    for mapping in _MAPPINGS.split(smaps):
        library = _LIBRARY.match(mapping)
        if library and dict(_OWN.findall(mapping)) == {"Anonymous": "0", "Swap": "0"}:
            found.append((int(library[1], 16), int(library[2], 16)))
    return found


def _cgroup_free_bytes() -> int:
    """Return the bytes that the container's limit leaves, or 1 << 62 without a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:  # no cgroup v2
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)


class MemoryBudget:
    """Makes threads allocate large pieces of memory one after another when all at once would not fit."""

    def __init__(
        self, timeout_s: float, small_bytes: int = 64 << 20, free_bytes: Callable[[], int] = free_host_bytes
    ) -> None:
        """timeout_s: maximum wait, seconds. small_bytes: pieces up to this size are neither counted nor delayed.

        free_bytes: returns the free bytes of the host.
        """
        self._timeout_s = timeout_s
        self._small_bytes = small_bytes
        self._free_bytes = free_bytes
        self._held = 0  # guarded by _changed
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait until a piece fits beside those held. Raises Unavailable if it does not within the timeout."""
        if num_bytes <= self._small_bytes:
            yield
            return
        with self._changed:
            if (
                not self._changed.wait_for(
                    lambda: not self._held or self._held + num_bytes <= self._free_bytes(), self._timeout_s
                )
                or num_bytes > self._free_bytes()
            ):
                raise Unavailable(f"the adapter needs {num_bytes} bytes of memory, more than this worker has free")
            self._held += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= num_bytes
                self._changed.notify_all()
