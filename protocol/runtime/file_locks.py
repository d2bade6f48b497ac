"""Locks that processes of one machine hold on files, and data that must be on the disk before it is relied on."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path


def lock_first(files: Iterable[Path], *, inherited: bool = False) -> Path | None:
    """Lock the first file that no other process has locked; return it, or None if all are locked.

    The lock ends with this process. files: created if missing; their folder exists. inherited: whether a program that
    this process executes keeps the lock. Raises OSError if a file cannot be created.
    """
    for path in files:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        os.set_inheritable(file, inherited)
        return path  # the file stays open, and so locked
    return None


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder. Raises OSError.

    Until then a power failure may lose what was written, or a name that a rename has given.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
