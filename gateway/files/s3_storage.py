"""Stores files as objects in S3 or a compatible server."""

# boto3 is untyped, so this file is checked less strictly.
# pyright: standard

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from gateway.files.storage import CHUNK_BYTES, as_unavailable, close
from protocol.runtime.free_space import Reserve
from protocol.wire.errors import LorafleetError, NotFound, Unavailable


def make_client(endpoint: str) -> Any:
    """Return a boto3 client for an endpoint, "" for AWS; credentials and region come from the usual AWS settings."""
    config = Config(connect_timeout=10, read_timeout=30, retries={"max_attempts": 4, "mode": "standard"})
    return boto3.client("s3", endpoint_url=endpoint or None, config=config)


class S3Storage:
    """Objects below a prefix of a bucket."""

    def __init__(self, client: Any, bucket: str, prefix: str, reserve: Reserve | None = None) -> None:
        """Use a prefix of a bucket.

        client: boto3's; prefix: of all keys, with a trailing slash; reserve: free-space reserve of the disk that
        buffers uploads; None: none.
        """
        self._s3 = client
        self._bucket = bucket
        self._prefix = prefix
        self._reserve = reserve or Reserve(0)
        self._waiting = Path(tempfile.gettempdir())

    async def check_room(self, num_bytes: int) -> None:
        """See `Storage.check_room`: checks the disk that buffers a file until it is complete."""
        await asyncio.to_thread(self._reserve.check, self._waiting, num_bytes)

    async def write(self, name: str, chunks: AsyncIterator[bytes | bytearray]) -> int:
        """See `Storage.write`. The content is buffered in a temporary file until it is complete."""
        num_bytes = 0
        try:
            with tempfile.TemporaryFile(dir=self._waiting) as file:
                async for chunk in chunks:
                    await asyncio.to_thread(self._append, file, chunk)
                    num_bytes += len(chunk)
                file.seek(0)
                await asyncio.to_thread(self._s3.upload_fileobj, file, self._bucket, self._prefix + name)
        except (BotoCoreError, ClientError) as error:
            raise _failed(error) from error
        except OSError as error:
            raise as_unavailable(error) from error
        finally:
            await close(chunks)
        return num_bytes

    def _append(self, file: BinaryIO, chunk: bytes | bytearray) -> None:
        self._reserve.check(self._waiting, len(chunk))
        file.write(chunk)

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See `Storage.read`."""
        if end is not None and end <= start:
            return
        ask = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        try:
            reply = await asyncio.to_thread(self._s3.get_object, Bucket=self._bucket, Key=self._prefix + name, **ask)
            with closing(reply["Body"]) as body:
                while chunk := await asyncio.to_thread(body.read, CHUNK_BYTES):
                    yield chunk
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code == "InvalidRange":
                return
            if code in ("NoSuchKey", "404"):
                raise NotFound("the content of this file no longer exists") from error
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
        )
        return sorted(entry["Key"].removeprefix(self._prefix) for page in pages for entry in page.get("Contents", ()))

    async def delete(self, name: str) -> None:
        """See `Storage.delete`."""
        try:
            for found in [name, *await self.names(name)]:
                await asyncio.to_thread(self._s3.delete_object, Bucket=self._bucket, Key=self._prefix + found)
        except (BotoCoreError, ClientError) as error:
            raise _failed(error) from error

    async def tidy(self) -> None:
        """Do nothing: S3 does not show incomplete objects."""


def _failed(error: Exception) -> LorafleetError:
    return Unavailable(f"the S3 file storage failed: {type(error).__name__}")
