"""Where the bytes of files are: a folder that all gateways share, or a place in S3.

What is written under a name is there whole or not at all, and is not changed any more.
"""

# boto3 has no types, so this file is checked less strictly.
# pyright: standard

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from protocol.runtime.private_files import private_folder
from protocol.wire.errors import BadRequest, LorafleetError, NotFound, Unavailable

CHUNK_BYTES = 256 << 10
"""Bytes that are read or written at once."""

PARTIAL = ".part"
"""Ending of a file that is being written."""

ABANDONED_S = 86_400.0
"""Age of a file that was begun and never finished, after which it is deleted."""


class Storage(Protocol):
    """Holds bytes by name; a name is a few words with slashes between them."""

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """Write under a name, all or nothing, in place of what was there. Returns the number of bytes.

        Raises what `chunks` raises, and Unavailable.
        """
        ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes `[start, end)` under a name; None: all from `start`. Raises NotFound, Unavailable."""
        ...

    async def names(self, prefix: str) -> list[str]:
        """Return the names below a prefix, sorted. Raises Unavailable."""
        ...

    async def delete(self, name: str) -> None:
        """Delete a name, or all below it; nothing happens where there is none. Raises Unavailable."""
        ...

    async def tidy(self) -> None:
        """Delete what was begun long ago and never finished."""
        ...


def open_storage(place: str, default: Path, s3_endpoint: str = "") -> Storage:
    """Return the storage of a setting: a folder, `s3://BUCKET/PREFIX`, or "" for the default folder.

    Raises BadRequest for what is neither.
    """
    if not place.startswith("s3://"):
        return FolderStorage(Path(place).expanduser() if place else default)
    bucket, _, prefix = place.removeprefix("s3://").rstrip("/").partition("/")
    if not bucket:
        raise BadRequest(f"files: {place!r} names no bucket; it is s3://BUCKET/PREFIX")
    config = Config(connect_timeout=10, read_timeout=30, retries={"max_attempts": 4, "mode": "standard"})
    client = boto3.client("s3", endpoint_url=s3_endpoint or None, config=config)
    return S3Storage(client, bucket, f"{prefix}/" if prefix else "")


class FolderStorage:
    """Files below a folder, which only this user may read."""

    def __init__(self, root: Path) -> None:
        """Use a folder, which is made with the first file."""
        self._root = root

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """See `Storage.write`."""
        path = self._root / name
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        num_bytes = 0
        try:
            file = await asyncio.to_thread(_create, part)
            try:
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
                    num_bytes += len(chunk)
                await asyncio.to_thread(_finish, file, part, path)
            finally:
                file.close()
        except OSError as error:
            raise Unavailable(f"the storage of files cannot be written: {error.strerror}") from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return num_bytes

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See `Storage.read`."""
        try:
            file = await asyncio.to_thread((self._root / name).open, "rb")
        except FileNotFoundError as error:
            raise NotFound("the bytes of this file are not there any more") from error
        except OSError as error:
            raise Unavailable(f"the storage of files cannot be read: {error.strerror}") from error
        with file:
            file.seek(start)
            while end is None or start < end:
                size = CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - start)
                chunk = await asyncio.to_thread(file.read, size)
                if not chunk:
                    return
                start += len(chunk)
                yield chunk

    async def names(self, prefix: str) -> list[str]:
        """See `Storage.names`."""
        return await asyncio.to_thread(self._names, prefix)

    def _names(self, prefix: str) -> list[str]:
        folder = self._root / prefix
        found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != PARTIAL]
        return sorted(path.relative_to(self._root).as_posix() for path in found)

    async def delete(self, name: str) -> None:
        """See `Storage.delete`."""
        await asyncio.to_thread(self._delete, name)

    def _delete(self, name: str) -> None:
        path = self._root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    async def tidy(self) -> None:
        """Delete what was begun long ago and never finished."""
        await asyncio.to_thread(self._tidy)

    def _tidy(self) -> None:
        for path in self._root.rglob(f"*{PARTIAL}"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - ABANDONED_S:
                    path.unlink()


def _create(part: Path) -> BinaryIO:
    private_folder(part.parent)
    return os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _finish(file: BinaryIO, part: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    part.replace(path)


class S3Storage:
    """Objects below a prefix of a bucket."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        """`client`: of boto3; `prefix`: of all keys, with its slash."""
        self._s3 = client
        self._bucket = bucket
        self._prefix = prefix

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """See `Storage.write`. The bytes wait in a temporary file until all are there."""
        num_bytes = 0
        with tempfile.TemporaryFile() as file:
            async for chunk in chunks:
                await asyncio.to_thread(file.write, chunk)
                num_bytes += len(chunk)
            file.seek(0)
            try:
                await asyncio.to_thread(self._s3.upload_fileobj, file, self._bucket, self._prefix + name)
            except (BotoCoreError, ClientError) as error:
                raise _failed(error) from error
        return num_bytes

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See `Storage.read`."""
        if end is not None and end <= start:
            return
        ask = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        try:
            reply = await asyncio.to_thread(
                self._s3.get_object, Bucket=self._bucket, Key=self._prefix + name, **ask
            )  # fmt: skip
            with closing(reply["Body"]) as body:
                while chunk := await asyncio.to_thread(body.read, CHUNK_BYTES):
                    yield chunk
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code == "InvalidRange":
                return
            if code in ("NoSuchKey", "404"):
                raise NotFound("the bytes of this file are not there any more") from error
            raise _failed(error) from error
        except BotoCoreError as error:
            raise _failed(error) from error

    async def names(self, prefix: str) -> list[str]:
        """See `Storage.names`."""
        try:
            return await asyncio.to_thread(self._names, prefix)
        except (BotoCoreError, ClientError) as error:
            raise _failed(error) from error

    def _names(self, prefix: str) -> list[str]:
        pages = self._s3.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=f"{self._prefix}{prefix.rstrip('/')}/"
        )  # fmt: skip
        return sorted(entry["Key"].removeprefix(self._prefix) for page in pages for entry in page.get("Contents", ()))

    async def delete(self, name: str) -> None:
        """See `Storage.delete`."""
        try:
            for found in [name, *await self.names(name)]:
                await asyncio.to_thread(self._s3.delete_object, Bucket=self._bucket, Key=self._prefix + found)
        except (BotoCoreError, ClientError) as error:
            raise _failed(error) from error

    async def tidy(self) -> None:
        """Do nothing: S3 shows nothing that is not finished."""


def _failed(error: Exception) -> LorafleetError:
    return Unavailable(f"the storage of files in S3 fails: {type(error).__name__}")
