"""Faults of resources: a queue server without memory or disk space, gateways without their files, a wrong clock."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from collections.abc import AsyncIterator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from protocol.queue.connection.redis_client import connect

HOOK = Path(__file__).parent / "wall_clock"
"""Folder with the `sitecustomize.py` that gives a Python process another wall clock."""

JUMP_S = 3600

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


async def ask(url: str, *words: str | int) -> Any:
    """Return a server's reply to a command. Raises what the queue's client raises."""
    client = connect(url, timeout_s=2.0)
    try:
        return await client.execute_command(*words)
    finally:
        await client.aclose()


@asynccontextmanager
async def no_memory(url: str) -> AsyncIterator[None]:
    """Limit a server's memory to half of what it uses, during the block."""
    most = (await ask(url, "INFO", "memory"))["maxmemory"]
    used = (await ask(url, "INFO", "memory"))["used_memory"]
    await ask(url, "CONFIG", "SET", "maxmemory", used // 2)
    try:
        yield
    finally:
        await ask(url, "CONFIG", "SET", "maxmemory", most)


def no_disk(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Limit all files of a server to the size of its append-only file. folder: the server's data.

    The server must have been started with SIGXFSZ ignored, or that signal kills it.
    """
    sizes = [file.stat().st_size for file in (folder / "appendonlydir").glob("*.incr.aof")]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (max(sizes, default=0), resource.RLIM_INFINITY))


def disk_again(process: subprocess.Popen[bytes]) -> None:
    """Remove the limit on file sizes."""
    if process.poll() is None:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)


@contextmanager
def no_files(folder: Path) -> Generator[None]:
    """Make reading from and writing to a folder fail during the block, also for files that are already open.

    A file takes the folder's place, which stops the superuser too. The two are exchanged in one step: for a moment
    without either, a stored file would correctly be reported as absent.
    """
    away = folder.with_name(f"{folder.name}.away")
    folder.mkdir(parents=True, exist_ok=True)
    away.touch()
    _exchange(folder, away)
    try:
        yield
    finally:
        _exchange(folder, away)
        away.unlink()


def _exchange(one: Path, other: Path) -> None:
    """Exchange two paths atomically: renameat2(2) with RENAME_EXCHANGE. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(one), None, str(other))


class Clocks:
    """Settable wall clocks of Python processes, one each; monotonic clocks are not changed."""

    def __init__(self, folder: Path) -> None:
        """folder: holds one file per clock."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def environment(self, name: str) -> Mapping[str, str]:
        """Return the environment variables that give a process the clock of a name."""
        if not self._file(name).exists():
            self.jump(name, 0)
        path = os.pathsep.join(filter(None, (str(HOOK), os.environ.get("PYTHONPATH"))))
        return {"PYTHONPATH": path, "CHAOS_CLOCK": str(self._file(name))}

    def jump(self, name: str, to_s: int) -> None:
        """Set a clock to `to_s` seconds after the right time."""
        new = self._file(name).with_suffix(".new")
        new.write_text(str(to_s))
        os.replace(new, self._file(name))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.clock"
