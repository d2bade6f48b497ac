"""Memory into which the loader process reads adapters: anonymous files whose descriptors can be sent.

The first write to a page of such a file takes about ten times as long as a later one, so small files are reused.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from contextlib import suppress

KEPT_BYTES = 32 << 20
"""Maximum total bytes of files kept for reuse."""

ROUND_BYTES = 1 << 20
"""File sizes are rounded up to multiples of this, so that adapters of similar size can reuse a file."""


def rounded(num_bytes: int) -> int:
    """Return the size of a file for `num_bytes`."""
    return max(1, -(-num_bytes // ROUND_BYTES)) * ROUND_BYTES


def copy_of(content: memoryview, to: int | None = None) -> int:
    """Return the descriptor of an anonymous file with exactly this content. Raises OSError.

    to: the descriptor of an anonymous file to fill, closed on errors; None: create one.
    """
    fd = new_file() if to is None else to
    try:
        os.truncate(fd, len(content))
        while content:
            content = content[os.write(fd, content) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def new_file() -> int:
    """Return the descriptor of an empty anonymous file, in memory if the system supports that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lorafleet-adapter")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class AnonymousFile:
    """A mapped anonymous file, initially all zeros."""

    def __init__(self, num_bytes: int) -> None:
        """Create the file. Raises OSError if there is no space for it."""
        self.fd = new_file()
        try:
            os.truncate(self.fd, num_bytes)
            self.memory = mmap.mmap(self.fd, num_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self.num_bytes = num_bytes

    def view(self, num_bytes: int) -> memoryview:
        """Return a view of the first `num_bytes` bytes."""
        return memoryview(self.memory)[:num_bytes]

    def drop(self, begin: int, end: int) -> None:
        """Return the whole pages in [begin, end) to the system; they read as zeros afterwards."""
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_REMOVE"):
            with suppress(OSError):  # the file system may not support it
                self.memory.madvise(mmap.MADV_REMOVE, first, last - first)

    def handed_over(self, num_bytes: int) -> int:
        """Truncate the file to `num_bytes`, and return a duplicate descriptor for its receiver."""
        os.truncate(self.fd, num_bytes)
        return os.dup(self.fd)

    def close(self) -> None:
        """Close the descriptor and unmap the file; if views of it remain, it is unmapped when they are released."""
        os.close(self.fd)
        with suppress(BufferError):
            self.memory.close()


class KeptFiles:
    """A pool of files for reuse. Methods may be called from any thread."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        """max_bytes: maximum total size of the files kept."""
        self._max_bytes = max_bytes
        self._kept: list[AnonymousFile] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> AnonymousFile:
        """Return a file of at least `num_bytes`, with arbitrary content. The caller closes it or gives it back."""
        with self._lock:
            fitting = [file for file in self._kept if num_bytes <= file.num_bytes <= 2 * num_bytes + ROUND_BYTES]
            if fitting:
                file = min(fitting, key=lambda file: file.num_bytes)
                self._kept.remove(file)
                return file
        return AnonymousFile(rounded(num_bytes))

    def keeps(self, file: AnonymousFile) -> bool:
        """Return whether a file is small enough to be reused."""
        return file.num_bytes <= self._max_bytes

    def give_back(self, file: AnonymousFile) -> None:
        """Keep an unused file if it is small enough; the oldest files are closed if the total is too large."""
        if not self.keeps(file):
            file.close()
            return
        with self._lock:
            self._kept.append(file)
            while sum(file.num_bytes for file in self._kept) > self._max_bytes:
                self._kept.pop(0).close()
