"""The part of every disk that nothing brought from outside may take.

The queue's log is often on the same disk as files, adapters and answers of batches. A disk that these filled would stop
the queue, and with it the whole fleet, deletions among it. So whoever writes what others bring asks here first, and
again with every piece.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from protocol.wire.errors import NoRoom

Free = Callable[[Path], int]
"""Returns the free bytes of the disk on which a folder or file is. Raises OSError."""


def free_bytes(place: Path) -> int:
    """Return the bytes that this user may still write to the disk of a path, which is there. Raises OSError."""
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize


class Reserve:
    """The free space that is kept on each disk, and the room that is promised to writers of this process."""

    def __init__(self, keep_free: int, free: Free = free_bytes) -> None:
        """keep_free: bytes of each disk."""
        self._keep_free = keep_free
        self._free = free
        self._promised: dict[int, int] = {}  # bytes still to come, by disk
        self._lock = Lock()

    def check(self, place: Path, num_bytes: int = 0) -> None:
        """Raise NoRoom unless `num_bytes` more leave the reserve of a path's disk free. It costs some µs.

        place: where the bytes are to be; it, or a folder above it, is there. Raises OSError.
        """
        self._check(_existing(place), num_bytes, 0)

    def _check(self, place: Path, num_bytes: int, promised: int) -> None:
        free = self._free(place)
        if free - promised - num_bytes < self._keep_free:
            taken = f", of which {promised} are promised to others" if promised else ""
            raise NoRoom(
                f"{num_bytes} bytes have no room: the disk has {free} free{taken}, and {self._keep_free} are kept free"
            )

    @contextmanager
    def room(self, place: Path, num_bytes: int) -> Generator[None]:
        """Promise room for `num_bytes` until the block ends; others who ask meanwhile find it taken. Raises as `check`.

        What is written meanwhile counts twice, as taken and as promised: the reserve is larger then, never smaller.
        """
        found = _existing(place)
        disk = found.stat().st_dev
        with self._lock:
            self._check(found, num_bytes, self._promised.get(disk, 0))
            self._promised[disk] = self._promised.get(disk, 0) + num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._promised[disk] -= num_bytes
                if not self._promised[disk]:
                    del self._promised[disk]


def _existing(place: Path) -> Path:
    """Return a path, or the nearest folder above it that is there."""
    return next(path for path in (place, *place.absolute().parents) if path.exists())
