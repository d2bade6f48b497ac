"""Memory that the loader's process reads adapters into: files without a name, whose descriptors can be sent.

The first write to a page of such a file takes about as long as ten later ones. So small files are kept and used again.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from contextlib import suppress

KEPT_BYTES = 32 << 20
"""Maximum bytes cached for later adapters."""

ROUND_BYTES = 1 << 20
"""Sizes are rounded up to this: adapters of nearly one size use each other's memory."""


def rounded(num_bytes: int) -> int:
    """Return the size of a file that has room for some bytes."""
    return max(1, -(-num_bytes // ROUND_BYTES)) * ROUND_BYTES


def copy_of(content: memoryview, to: int | None = None) -> int:
    """Return the descriptor of a file without a name that has this content and nothing more. Raises OSError.

    to: a descriptor of such a file, to be used and closed on errors; None: of a new one.
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
    """Return the descriptor of an empty file without a name, in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lorafleet-adapter")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class AnonymousFile:
    """A mapped file without a name, of zeros until something is written to it."""

    def __init__(self, num_bytes: int) -> None:
        """Make one. Raises OSError where there is no room for it."""
        self.fd = new_file()
        try:
            os.truncate(self.fd, num_bytes)
            self.memory = mmap.mmap(self.fd, num_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self.num_bytes = num_bytes

    def view(self, num_bytes: int) -> memoryview:
        """Return the first bytes."""
        return memoryview(self.memory)[:num_bytes]

    def drop(self, begin: int, end: int) -> None:
        """Give the whole pages between two places back to the system; they are zeros then."""
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_REMOVE"):
            with suppress(OSError):  # a file system that cannot
                self.memory.madvise(mmap.MADV_REMOVE, first, last - first)

    def handed_over(self, num_bytes: int) -> int:
        """Cut the file to its first bytes, and return a duplicate descriptor for its receiver."""
        os.truncate(self.fd, num_bytes)
        return os.dup(self.fd)

    def close(self) -> None:
        """Close the descriptor and unmap the file; where views of it are left, it is unmapped when these end."""
        os.close(self.fd)
        with suppress(BufferError):
            self.memory.close()


class KeptFiles:
    """A pool of files for reuse. Methods may be called from any thread."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        """max_bytes: of all files that wait to be used."""
        self._max_bytes = max_bytes
        self._kept: list[AnonymousFile] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> AnonymousFile:
        """Return a file of `num_bytes` or more, with any content. The caller closes it or gives it back."""
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
        """Keep a file that nobody uses any more, if it is small; the oldest go where there are too many."""
        if not self.keeps(file):
            file.close()
            return
        with self._lock:
            self._kept.append(file)
            while sum(file.num_bytes for file in self._kept) > self._max_bytes:
                self._kept.pop(0).close()
