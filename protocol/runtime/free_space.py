"""The free-space reserve of every disk, which data from clients may not use.

The queue's log is often on the same disk as files, adapters and batch results. If they filled the disk, the queue would
stop and with it the whole fleet, including deletions. So code that writes clients' data checks the reserve before it
begins and again with every piece.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from protocol.wire.errors import NoRoom

Free = Callable[[Path], int]
"""Returns the free bytes of the disk that holds a folder or file. Raises OSError."""


def free_bytes(place: Path) -> int:
    """Return the bytes that this user can still write to the disk of an existing path. Raises OSError."""
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize


class Reserve:
    """The free-space reserve of each disk, and the space promised to writers of this process."""

    def __init__(self, keep_free: int, free: Free = free_bytes) -> None:
        """keep_free: bytes to keep free on each disk."""
        self._keep_free = keep_free
        self._free = free
        self._promises: dict[int, tuple[int, Callable[[], int]]] = {}  # id -> disk, bytes still to come
        self._lock = Lock()

    def check(self, place: Path, num_bytes: int = 0) -> None:
        """Raise NoRoom unless the reserve stays free after `num_bytes` more on a path's disk. Costs some µs.

        Promises are ignored: a writer that has one checks again with each piece. place: the destination, of which at
        least some parent folder exists. Raises OSError.
        """
        self._check(_existing(place), num_bytes, 0)

    def _check(self, place: Path, num_bytes: int, promised: int) -> None:
        free = self._free(place)
        if free - promised - num_bytes < self._keep_free:
            taken = f", with {promised} reserved for others" if promised else ""
            raise NoRoom(
                f"{num_bytes} bytes do not fit: the disk has {free} free{taken}, and {self._keep_free} are kept free"
            )

    @contextmanager
    def room(self, place: Path, to_come: Callable[[], int]) -> Generator[None]:
        """Promise space to this block until it ends; later promises take it into account. Raises as `check`.

        to_come: returns the number of bytes still to be written.
        """
        found = _existing(place)
        disk = found.stat().st_dev
        with self._lock:
            promised = sum(to_come() for other, to_come in self._promises.values() if other == disk)
            self._check(found, to_come(), promised)
            promise = object()
            self._promises[id(promise)] = (disk, to_come)
        try:
            yield
        finally:
            with self._lock:
                del self._promises[id(promise)]


def size_of(*places: Path) -> int:
    """Return the total bytes of files, and of all files below folders; missing or vanishing ones count as 0."""
    num = 0
    for place in places:
        for folder, _, names in os.walk(place):
            num += sum(_size(os.path.join(folder, name)) for name in names)
        if not place.is_dir():
            num += _size(place)
    return num


def _size(path: str | Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return 0


def _existing(place: Path) -> Path:
    """Return a path, or its nearest existing parent folder."""
    return next(path for path in (place, *place.absolute().parents) if path.exists())
