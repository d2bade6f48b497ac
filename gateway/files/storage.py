"""The storage of file contents: a folder shared by all gateways, or a prefix in S3.

The content of a name is complete or absent, and never modified.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from protocol.runtime.file_locks import flush
from protocol.runtime.free_space import Reserve
from protocol.runtime.private_files import private_folder
from protocol.wire.errors import LorafleetError, NoRoom, NotFound, Unavailable

CHUNK_BYTES = 256 << 10
"""Bytes read or written at a time."""

PARTIAL = ".part"
"""Suffix of a file that is being written."""

ABANDONED_S = 86_400.0
"""Age in seconds at which an unfinished file is deleted."""


class Storage(Protocol):
    """Stores bytes by name; a name is a path of a few words separated by slashes."""

    async def check_room(self, num_bytes: int) -> None:
        """Raise NoRoom unless this machine's disk has `num_bytes` free beyond the reserve."""
        ...

    async def write(self, name: str, chunks: AsyncIterator[bytes | bytearray]) -> int:
        """Write or replace a file atomically. Return the number of bytes.

        Raises as `chunks`, NoRoom once only the reserve is free, and Unavailable.
        """
        ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes `[start, end)` of a name; end None: to the end. Raises NotFound, Unavailable."""
        ...

    async def names(self, prefix: str) -> list[str]:
        """Return the names below a prefix, sorted. Raises Unavailable."""
        ...

    async def delete(self, name: str) -> None:
        """Delete a name and all names below it, if they exist. Raises Unavailable."""
        ...

    async def tidy(self) -> None:
        """Delete old unfinished files."""
        ...


class FolderStorage:
    """Stores files in a folder that only this user may read."""

    def __init__(self, root: Path, reserve: Reserve | None = None) -> None:
        """Use a folder, created with the first file. reserve: free-space reserve of its disk; None: none."""
        self._root = root
        self._reserve = reserve or Reserve(0)

    async def check_room(self, num_bytes: int) -> None:
        """See `Storage.check_room`."""
        await asyncio.to_thread(self._reserve.check, self._root, num_bytes)

    async def write(self, name: str, chunks: AsyncIterator[bytes | bytearray]) -> int:
        """See `Storage.write`."""
        path = self._root / name
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        num_bytes = 0
        try:
            file = await _opened(lambda: _create(part))
            try:
                async for chunk in chunks:
                    await asyncio.to_thread(self._append, file, part, chunk)
                    num_bytes += len(chunk)
                await asyncio.to_thread(_finish, file, part, path)
            finally:
                with suppress(OSError):  # write errors were raised earlier, or no longer matter
                    file.close()
        except OSError as error:
            raise as_unavailable(error) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            await close(chunks)
        return num_bytes

    def _append(self, file: BinaryIO, part: Path, chunk: bytes | bytearray) -> None:
        self._reserve.check(part, len(chunk))
        file.write(chunk)

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See `Storage.read`."""
        path = self._root / name
        try:
            if end is not None and end - start <= CHUNK_BYTES:  # a line of a batch: one call in a thread
                yield await asyncio.to_thread(_part, path, start, end)
                return
            file = await _opened(lambda: path.open("rb"))
        except FileNotFoundError as error:
            raise await asyncio.to_thread(self._absence) from error
        except OSError as error:
            raise Unavailable(f"the file storage cannot be read: {error.strerror}") from error
        with file:
            file.seek(start)
            while end is None or start < end:
                size = CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - start)
                chunk = await asyncio.to_thread(file.read, size)
                if not chunk:
                    return
                start += len(chunk)
                yield chunk

    def _absence(self) -> LorafleetError:
        """Return the error for a missing content. Without the folder itself, which may return, nothing is known."""
        if not self._root.is_dir():
            return Unavailable("the file storage cannot be read: its folder is missing")
        return NotFound("the content of this file no longer exists")

    async def names(self, prefix: str) -> list[str]:
        """See `Storage.names`."""
        return await asyncio.to_thread(self._names, prefix)

    def _names(self, prefix: str) -> list[str]:
        found: list[str] = []
        for folder, _, names in os.walk(self._root / prefix, onerror=_unless_absent):
            place = Path(folder).relative_to(self._root)
            found += [(place / name).as_posix() for name in names if not name.endswith(PARTIAL)]
        return sorted(found)

    async def delete(self, name: str) -> None:
        """See `Storage.delete`."""
        try:
            await asyncio.to_thread(self._delete, name)
        except OSError as error:
            raise Unavailable(f"the file storage cannot be changed: {error.strerror}") from error

    def _delete(self, name: str) -> None:
        path = self._root / name
        while path.is_dir():
            with suppress(FileNotFoundError):  # another gateway deletes it too
                shutil.rmtree(path)
        path.unlink(missing_ok=True)

    async def tidy(self) -> None:
        """Delete old unfinished files."""
        await asyncio.to_thread(self._tidy)

    def _tidy(self) -> None:
        for path in self._root.rglob(f"*{PARTIAL}"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - ABANDONED_S:
                    path.unlink()


async def close(chunks: AsyncIterator[object]) -> None:
    """Close a generator that may not have been read to its end: its file would stay open until it is collected."""
    if isinstance(chunks, AsyncGenerator):
        await chunks.aclose()


def as_unavailable(error: OSError) -> Unavailable:
    """Return the error for a failed write to the disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoom(f"the file storage is full: {error.strerror}")
    return Unavailable(f"the file storage cannot be written: {error.strerror}")


def _unless_absent(error: OSError) -> None:
    """Raise Unavailable for a folder that exists but cannot be listed, which must not be taken for an empty one."""
    if not isinstance(error, FileNotFoundError):
        raise Unavailable(f"the file storage cannot be read: {error.strerror}") from error


def _part(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


async def _opened(open_file: Callable[[], BinaryIO]) -> BinaryIO:
    """Open a file in a thread. Raises OSError. If the caller is cancelled, the file is closed."""
    opening = asyncio.get_running_loop().run_in_executor(None, open_file)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


def _close(opening: asyncio.Future[BinaryIO]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _create(part: Path) -> BinaryIO:
    private_folder(part.parent)
    return os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _finish(file: BinaryIO, part: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    part.replace(path)
    flush(path.parent)  # otherwise a power failure might lose the name after its record was written
