"""Adapters that operators upload: zips, unpacked into folders under the adapter root, to which registrations refer.

A folder has only the files that a store reads of any adapter, under their own names: no name in a zip becomes a path. A
registration keeps its upload; one without a registration is deleted after KEPT_S, so that a replaced one can be
registered again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import secrets
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from adapter_store.sources import MORE_FILES, choose_weights
from peft_adapters.format import CONFIG_FILE
from protocol.runtime.free_space import Reserve, size_of
from protocol.wire.errors import BadRequest, Conflict, LorafleetError, NoRoom, Overloaded, TooLarge

logger = logging.getLogger(__name__)

FOLDER = "uploads/kept"
"""Below the adapter root, one level deeper than folders that are served without a registration."""

MAX_ENTRIES = 1000
"""Maximum number of entries in a zip."""

MAX_READ_BYTES = 1 << 20
"""Maximum bytes per read of a zip, and so of its directory."""

MAX_TEXT_BYTES = 64 << 20
"""Maximum bytes of a file other than the weights."""

CHUNK_BYTES = 1 << 20
AT_ONCE = 2
KEPT_S = 7 * 86_400
PART_S = 3600  # age at which a partial upload counts as left by a dead process

MALFORMED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, RuntimeError,
    OverflowError,
)  # fmt: skip
"""Raised by Python's reader for a file that is not a zip, is truncated, or is crafted to confuse the reader."""

_ID = re.compile(r"u[0-9a-f]{24}")


class Uploads:
    """The uploaded adapters of an adapter root."""

    def __init__(self, root: Path | None, max_bytes: int, max_file_bytes: int, reserve: Reserve | None = None) -> None:
        """root: None without an adapter root. max_bytes: maximum of all uploads together; 0: uploads are off.

        reserve: free-space reserve of the root's disk; None: nothing is reserved.
        """
        self._root = root / FOLDER if root is not None else None
        self._max_bytes = max_bytes
        self._max_file_bytes = max_file_bytes
        self._reserve = reserve or Reserve(0)
        self._busy = 0
        self._promised = 0  # bytes promised to uploads in progress
        self._unpacking = asyncio.Lock()  # one at a time: the size of an unpacked upload is not known before

    async def take(self, chunks: AsyncIterator[bytes], length: int) -> str:
        """Store the adapter in a zip; return the source that names it. length: size of the zip in bytes.

        Raises BadRequest for a bad zip, Conflict if uploads are off, TooLarge, NoRoom, Overloaded.
        """
        if self._root is None or not self._max_bytes:
            what = "no adapter root: set --adapters" if self._root is None else "upload_bytes at 0"
            raise Conflict(f"the store has {what}", code="uploads_off")
        if self._busy >= AT_ONCE:
            raise Overloaded(f"{AT_ONCE} uploads are in progress: retry later", 5.0)
        self._busy += 1
        try:
            await asyncio.to_thread(self._root.mkdir, parents=True, exist_ok=True)
            # Counted each time, since other stores may share the root; in a thread, since there may be thousands.
            kept = await asyncio.to_thread(_kept_bytes, self._root)
            with self._promise(kept, length):
                return await self._take(self._root, chunks, length)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoRoom(f"the store's disk has no room: {error.strerror}") from error
            raise Conflict(f"the upload cannot be stored: {error.strerror}", code="uploads_off") from error
        finally:
            self._busy -= 1

    @contextmanager
    def _promise(self, kept: int, length: int) -> Generator[None]:
        """Count an upload against the limit until the block ends: its zip and, at the same time, its content.

        Raises TooLarge.
        """
        used, most = kept + self._promised, 2 * length
        if used + most > self._max_bytes:
            text = f"uploads use {used} bytes, and this one needs twice its {length} while it is unpacked"
            raise TooLarge(f"{text}; upload_bytes is {self._max_bytes}")
        self._promised += most
        try:
            yield
        finally:
            self._promised -= most

    async def _take(self, folder: Path, chunks: AsyncIterator[bytes], length: int) -> str:
        """Write, unpack and name an upload; see `take`."""
        name = f"u{secrets.token_hex(12)}"
        archive, part = folder / f".{name}.zip", folder / f".{name}"
        try:
            with self._reserve.room(folder, lambda: max(0, 2 * length - size_of(archive, part))):
                with archive.open("wb") as out:
                    async for chunk in chunks:
                        await asyncio.to_thread(self._write, out, chunk)
                async with self._unpacking:
                    kept = await asyncio.to_thread(_kept_bytes, folder)
                    # Its content may be larger than the zip, if there is space.
                    room = min(self._max_bytes - kept - self._promised + length, self._max_file_bytes)
                    await asyncio.to_thread(unpack, archive, part, room, check=partial(self._reserve.check, folder))
                    part.rename(folder / name)
        finally:
            await asyncio.to_thread(_remove, archive, part)
        return f"local:{FOLDER}/{name}"

    def _write(self, out: BinaryIO, chunk: bytes) -> None:
        assert self._root is not None
        self._reserve.check(self._root, len(chunk))
        out.write(chunk)

    def drop(self, name: str) -> bool:
        """Delete an uploaded adapter's folder; return whether one of this name existed."""
        if self._root is None or not _ID.fullmatch(name) or not (self._root / name).is_dir():
            return False
        _remove(self._root / name)
        return True

    def sweep(self, sources: Collection[str]) -> None:
        """Delete uploads that no registration has named for KEPT_S. sources: of all registrations."""
        if self._root is None or not self._root.is_dir():
            return
        now_s = time.time()
        for entry in list(os.scandir(self._root)):
            age_s = now_s - entry.stat(follow_symlinks=False).st_mtime
            if f"local:{FOLDER}/{entry.name}" in sources:
                if age_s > KEPT_S / 100:
                    os.utime(entry.path)
            elif age_s > (PART_S if entry.name.startswith(".") else KEPT_S):
                logger.info("the upload %s is deleted: no name refers to it", entry.name)
                _remove(Path(entry.path))


class _Bounded:
    """A zip file with bounded reads and checked seeks, since Python's reader trusts the numbers in a zip."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size if 0 <= size <= MAX_READ_BYTES else MAX_READ_BYTES + 1)
        if len(data) > MAX_READ_BYTES:
            raise BadRequest("the zip's directory is too large for an adapter", code="bad_zip")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, OverflowError, ValueError):
            raise BadRequest(f"the zip cannot be read: it names byte {offset}", code="bad_zip") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def unpack(
    archive: Path,
    folder: Path,
    max_bytes: int,
    max_text_bytes: int = MAX_TEXT_BYTES,
    check: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write an adapter's files from a zip to a new folder, at most `max_bytes` together. Raises BadRequest, TooLarge.

    max_text_bytes: maximum size of each file other than the weights. check: called with the number of bytes before each
    write; its errors, such as NoRoom, are raised. Raises OSError only for the disk, never for the zip.
    """
    try:
        with archive.open("rb") as raw, zipfile.ZipFile(cast("IO[bytes]", _Bounded(raw))) as found:
            entries = _chosen(found)
            if sum(entry.file_size for entry in entries.values()) > max_bytes:
                raise TooLarge(f"the adapter in the zip has more than {max_bytes} bytes")
            folder.mkdir()
            left = max_bytes
            for name, entry in entries.items():
                text = name in (CONFIG_FILE, *MORE_FILES)
                left -= _write(found, entry, folder / name, min(left, max_text_bytes) if text else left, check)
    except LorafleetError:
        raise
    except MALFORMED as error:
        raise BadRequest(f"the zip cannot be read: {error}"[:300], code="bad_zip") from error


def _chosen(found: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of an adapter's files, those in the folder of its weights, by name. Raises BadRequest."""
    entries = [entry for entry in found.infolist() if not entry.filename.endswith("/")]
    if len(entries) > MAX_ENTRIES:
        raise BadRequest(f"the zip has {len(entries)} entries; an adapter's may have {MAX_ENTRIES}", code="bad_zip")
    folders: dict[str, dict[str, zipfile.ZipInfo]] = {}
    for entry in entries:
        place, _, name = entry.filename.replace("\\", "/").rpartition("/")
        if name in folders.setdefault(place, {}):
            raise BadRequest(f"the zip has {name!r:.100} twice", code="bad_zip")
        folders[place][name] = entry
    holding = [(place, weights) for place, names in folders.items() if (weights := choose_weights(names))]
    if not holding:
        raise BadRequest(
            "the zip has no adapter: adapter_config.json with adapter_model.safetensors, or one .gguf", code="bad_zip"
        )
    depth = min(place.count("/") + bool(place) for place, _ in holding)
    nearest = [(place, weights) for place, weights in holding if place.count("/") + bool(place) == depth]
    if len(nearest) > 1:
        raise BadRequest(f"the zip has {len(nearest)} adapters side by side: upload one", code="bad_zip")
    place, weights = nearest[0]
    wanted = (weights, CONFIG_FILE, *MORE_FILES)
    return {name: folders[place][name] for name in wanted if name in folders[place]}


def _write(
    found: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, max_bytes: int, check: Callable[[int], None]
) -> int:
    """Write at most `max_bytes` of one entry, whatever size it claims; return its bytes."""
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadRequest(
            f"{path.name} in the zip is encrypted, or uses a compression other than deflate", code="bad_zip"
        )
    num = 0
    with found.open(entry) as source, path.open("xb") as out:
        while chunk := source.read(CHUNK_BYTES):
            num += len(chunk)
            if num > max_bytes:
                raise TooLarge(f"{path.name} in the zip has more than {max_bytes} bytes")
            check(len(chunk))
            out.write(chunk)
    return num


def _kept_bytes(root: Path) -> int:
    """Return the bytes of all complete uploads."""
    return size_of(*(Path(entry.path) for entry in os.scandir(root) if not entry.name.startswith(".")))


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
