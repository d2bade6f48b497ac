"""How much memory the host has left. Imports no torch: the loader's process asks too."""

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
"""How /proc/PID/smaps begins to tell of a library's code, or of its constants: what can be read only."""

_MAPPINGS = re.compile(r"^(?=[0-9a-f]+-[0-9a-f]+ )", re.MULTILINE)
_OWN = re.compile(r"^(Anonymous|Swap): +(\d+) kB$", re.MULTILINE)


def free_host_bytes() -> int:
    """Return the bytes that are free on the host, at most what the limit of this container leaves."""
    return min(psutil.virtual_memory().available, _cgroup_free_bytes())


def give_back_freed() -> None:
    """Let the system have the memory that was freed, which the allocator keeps otherwise. Only glibc is asked to.

    Torch's and Python's many small pieces leave it some 30 MB when a model has been loaded.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def let_go_of_libraries() -> None:
    """Let the system have the pages of libraries' code and constants: a start touches four times what steps do.

    They count as this process's memory otherwise. What is used again comes back from the system's cache of files, by
    some hundred page faults. Does nothing but on Linux.
    """
    try:
        smaps = Path("/proc/self/smaps").read_text()
    except OSError:
        return
    madvise = ctypes.CDLL(None).madvise
    for start, end in unchanged_libraries(smaps):
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def unchanged_libraries(smaps: str) -> list[tuple[int, int]]:
    """Return the mappings [start, end) of libraries that can be read only, and have no page that is not as in the file.

    smaps: what /proc/PID/smaps says. Constants that the loader has filled with addresses are such pages.
    """
    found: list[tuple[int, int]] = []
    for mapping in _MAPPINGS.split(smaps):
        library = _LIBRARY.match(mapping)
        if library and dict(_OWN.findall(mapping)) == {"Anonymous": "0", "Swap": "0"}:
            found.append((int(library[1], 16), int(library[2], 16)))
    return found


def _cgroup_free_bytes() -> int:
    """Return what the container's limit leaves; a very large number without one."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:  # no cgroup v2
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)


class MemoryBudget:
    """Lets threads have large pieces of memory one after another, if all of them at once would take too much."""

    def __init__(
        self, timeout_s: float, small_bytes: int = 64 << 20, free_bytes: Callable[[], int] = free_host_bytes
    ) -> None:
        """timeout_s: the longest wait. small_bytes: pieces up to this size are not counted, so that they wait for none.

        free_bytes: returns what the host has left.
        """
        self._timeout_s = timeout_s
        self._small_bytes = small_bytes
        self._free_bytes = free_bytes
        self._held = 0  # guarded by _changed
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait until there is room for a piece beside those that are held. Raises Unavailable if there is none."""
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
