"""Adapters in S3 or a compatible server: `s3://bucket/prefix`, with the files directly under the prefix.

A GGUF file may have any name, so the prefix is listed if PEFT's and MLX-LM's files are missing.

The ETags of the objects identify the version. Every read sends If-Match, so a replaced object is noticed. S3 is read
only with the fleet's own credentials, never with callers' tokens.
"""

# boto3 has no types, so this file is checked less strictly.
# pyright: standard

from __future__ import annotations

import asyncio
import re
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from urllib3.exceptions import HTTPError

from adapter_store.sources import (
    FLEET,
    MORE_FILES,
    Changed,
    RemoteFile,
    SourceAccess,
    SourceVersion,
    choose_weights,
    needs_config,
)
from adapter_store.sources.retry import Attempts, Retries
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.formats.mlx import MLX_WEIGHTS
from protocol.runtime.adapter_refs import Reference, parse_reference
from protocol.runtime.free_space import Reserve
from protocol.wire.errors import AdapterRefused, LorafleetError, NotFound, PermissionDenied, Unavailable

CHUNK_BYTES = 64 << 10
"""Bytes per write; an interrupted body loses at most this many."""
MAX_LISTED = 1_000
"""Maximum objects under a prefix among which a GGUF file is searched: S3 lists this many per response."""
_MD5 = re.compile(r"[0-9a-f]{32}")


def make_client(endpoint: str = "") -> Any:
    """Return a boto3 client of `endpoint`, AWS by default; credentials and region come from the usual AWS settings."""
    config = Config(connect_timeout=10, read_timeout=30, retries={"max_attempts": 3, "mode": "standard"})
    return boto3.client("s3", endpoint_url=endpoint or None, config=config)


class S3Source:
    """The adapters at one S3 endpoint."""

    def __init__(self, client: Any, *, retries: Retries | None = None, reserve: Reserve | None = None) -> None:
        """client: a boto3 S3 client. retries: how reads are repeated. reserve: see `Source`."""
        self._reserve = reserve or Reserve(0)
        self._s3 = client
        self._endpoint: str = client.meta.endpoint_url
        self._retries = retries or Retries()

    def fixed(self, target: str) -> SourceVersion | None:
        """Return None: every object can be replaced."""
        return None

    async def resolve(self, target: str, access: SourceAccess = FLEET) -> SourceVersion:
        """Return the current version of the objects; see `Source.resolve`."""
        if not access.as_fleet:
            raise PermissionDenied(f"s3:{target:.300} may not be read by tenants with the fleet's credentials")
        return await asyncio.to_thread(self._resolve, target)

    def _resolve(self, target: str) -> SourceVersion:
        reference = parse_reference(f"s3:{target}")
        if reference is None:
            raise NotFound(f"s3:{target} is not an address of the form s3://bucket/prefix")
        bucket, prefix = reference.owner, reference.path
        files = self._needed(reference)
        for name in MORE_FILES:
            file = self._head(reference, name, absent=(403, 404))
            if file is not None:
                files[name] = file
        etags = ",".join(file.etag for file in files.values())
        return SourceVersion(
            key=f"s3:{self._endpoint}/{bucket}/{prefix}:{etags}",
            source=reference.source,
            target=f"//{bucket}/{prefix}",
            files=files,
        )

    def _needed(self, reference: Reference) -> dict[str, RemoteFile]:
        """Return an adapter's config and weights, or its single GGUF file, by name. Raises as `resolve`."""
        config = self._head(reference, CONFIG_FILE, absent=(404,))
        if config is not None:
            # Without the permission to list, S3 answers 403 for a missing object.
            for name, absent in ((WEIGHTS_FILE, (404,)), (MLX_WEIGHTS, (403, 404))):
                weights = self._head(reference, name, absent=absent)
                if weights is not None:
                    return {CONFIG_FILE: config, name: weights}
        name = choose_weights(self._names(reference))
        if not name or needs_config(name):
            if config is None:
                raise NotFound(f"{reference.source}/{CONFIG_FILE} does not exist, and no GGUF file beside it")
            raise AdapterRefused([f"{reference.source} has no {WEIGHTS_FILE}"])
        weights = self._head(reference, name, absent=())
        assert weights is not None
        return {name: weights}

    def _head(self, reference: Reference, name: str, *, absent: tuple[int, ...]) -> RemoteFile | None:
        """Return size and ETag of an object; None for a status in `absent`. Raises as `resolve`."""
        try:
            head = self._s3.head_object(Bucket=reference.owner, Key=f"{reference.path}/{name}")
        except ClientError as error:
            if _status(error) in absent:
                return None
            raise _refusal(error, f"{reference.source}/{name}") from error
        except BotoCoreError as error:
            raise _unreachable(error) from error
        return RemoteFile(head["ContentLength"], head["ETag"], _checksum(head))

    def _names(self, reference: Reference) -> list[str]:
        """Return the names of the objects directly under a prefix, none if listing is not permitted."""
        prefix = f"{reference.path}/"
        try:
            page = self._s3.list_objects_v2(Bucket=reference.owner, Prefix=prefix, Delimiter="/", MaxKeys=MAX_LISTED)
        except ClientError as error:
            if _status(error) in (403, 404):
                return []
            raise _refusal(error, reference.source) from error
        except BotoCoreError as error:
            raise _unreachable(error) from error
        if page.get("IsTruncated"):
            raise AdapterRefused(
                [f"{reference.source} has more than {MAX_LISTED} objects: too many to search for GGUF"]
            )
        return [entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ())]

    async def confirm(self, version: SourceVersion, access: SourceAccess) -> None:
        """Do nothing: S3 has granted access with the heads of the objects."""

    async def fetch(
        self, version: SourceVersion, name: str, path: Path, end: int, access: SourceAccess = FLEET
    ) -> None:
        """Download a part of an object, with retries; see `Source.fetch`."""
        attempts = Attempts(self._retries)
        with path.open("ab") as file:
            while (at := file.tell()) < end:
                try:
                    await asyncio.to_thread(self._read, version, name, file, end)
                except ClientError as error:
                    if _status(error) < 500:
                        raise _refusal(error, f"{version.source}/{name}") from error
                    await attempts.pause(f"S3 answered {_status(error)}")
                except (BotoCoreError, HTTPError, _Cut) as error:
                    if file.tell() > at:
                        attempts = Attempts(self._retries)  # progress was made: reset the count
                    await attempts.pause(f"the download of {version.source} was interrupted: {type(error).__name__}")

    def _read(self, version: SourceVersion, name: str, file: BinaryIO, end: int) -> None:
        bucket, _, prefix = version.target.removeprefix("//").partition("/")
        at = file.tell()
        reply = self._s3.get_object(
            Bucket=bucket,
            Key=f"{prefix}/{name}",
            Range=f"bytes={at}-{end - 1}",
            IfMatch=version.files[name].etag,
        )
        with closing(reply["Body"]) as body:
            if at and not str(reply.get("ContentRange", "")).startswith(f"bytes {at}-"):
                raise Changed(f"S3 did not return bytes {at}- of {version.source}/{name}")
            for chunk in body.iter_chunks(CHUNK_BYTES):
                self._reserve.check(Path(file.name), len(chunk))
                file.write(chunk[: end - file.tell()])
                if file.tell() >= end:
                    break  # ignore anything further that the server sends
        file.flush()
        if file.tell() < end:
            raise _Cut


class _Cut(Exception):
    """A body ended early."""


def _checksum(head: dict[str, Any]) -> Any:
    """Return the MD5 of an object: its ETag, if it was uploaded in one part and is not encrypted with a key."""
    etag = head["ETag"].strip('"')
    plain = head.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in head
    return ("md5", etag) if plain and _MD5.fullmatch(etag) else None


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))


def _refusal(error: ClientError, what: str) -> LorafleetError | Changed:
    status = _status(error)
    if status == 404:
        return NotFound(f"{what} does not exist")
    if status == 400:  # so a HEAD is answered without a body if a token has expired
        return Unavailable(f"S3 answered 400 for {what}: the store's credentials may have expired")
    if status in (401, 403):
        return PermissionDenied(f"the store has no access to {what}")
    if status in (412, 416):
        return Changed(f"{what} was replaced")
    return Unavailable(f"S3 answered {status} for {what}")


def _unreachable(error: BotoCoreError) -> LorafleetError:
    if isinstance(error, NoCredentialsError):
        return Unavailable("the store has no S3 credentials")
    return Unavailable(f"S3 cannot be reached: {type(error).__name__}")
