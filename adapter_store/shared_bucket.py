"""An S3 bucket that several stores share, so that only one of them fetches an adapter from its source."""

# boto3 has no types, so this file is checked less strictly.
# pyright: standard

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from adapter_store.blobs import Blobs
from adapter_store.sources import FILES
from peft_adapters.format import CONFIG_FILE, parse_config
from peft_adapters.texts.files import TEXTS_FIELD, TEXTS_FILE
from protocol.runtime.adapter_refs import parse_reference
from protocol.wire.errors import BadRequest

logger = logging.getLogger(__name__)

ERRORS = (BotoCoreError, ClientError, Boto3Error)


Room = Callable[[int], AbstractContextManager[None]]


class SharedBucket:
    """Blobs and versions in S3, in the layout of `Blobs`.

    All methods block. Failures are logged and never raised: a store also works without the bucket.
    """

    def __init__(self, client: Any, url: str) -> None:
        """url: s3://bucket/prefix. client: a boto3 S3 client. Raises BadRequest for an invalid URL."""
        reference = parse_reference(url)
        if reference is None or reference.scheme != "s3":
            raise BadRequest(f"store_bucket {url!r} is not of the form s3://bucket/prefix")
        self._s3 = client
        self._bucket, self._prefix = reference.owner, reference.path

    def push_blob(self, version: str, digest: str, blobs: Blobs) -> None:
        """Upload a blob's files, large ones in parts, and record its digest and base for the version.

        Does nothing if the blob is no longer on disk.
        """
        if (folder := blobs.verified(digest)) is None:
            return
        try:
            for name in (*FILES, *([TEXTS_FILE] if (folder / TEXTS_FILE).exists() else [])):
                if not self._has(f"blobs/{digest}/{name}"):
                    self._s3.upload_file(str(folder / name), self._bucket, f"{self._prefix}/blobs/{digest}/{name}")
            note = f"{digest}\n{blobs.named_base(version)}".encode()
            self._s3.put_object(Bucket=self._bucket, Key=self._version_key(version), Body=note)
        except ERRORS as error:
            logger.warning("adapter %.12s cannot be copied to the shared bucket: %s", digest, error)

    def note_of(self, version: str) -> tuple[str, str]:
        """Return the digest of a source's version, "" if no store has recorded it, and the base that it names."""
        try:
            reply = self._s3.get_object(Bucket=self._bucket, Key=self._version_key(version))
            digest, _, named = reply["Body"].read().decode().partition("\n")
            return digest, named.partition("\n")[0]
        except ERRORS as error:
            self._log_unless_missing(error)
            return "", ""

    def pull(self, digest: str, folder: Path, room: Room) -> bool:
        """Download a blob's files into a folder; return whether all existed. The caller checks their content.

        room: reserves this number of bytes while its block runs; its errors are raised.
        """

        def fetch(name: str) -> None:
            key, path = f"{self._prefix}/blobs/{digest}/{name}", folder / name
            num_bytes = self._s3.head_object(Bucket=self._bucket, Key=key)["ContentLength"]
            with room(num_bytes):
                self._s3.download_file(self._bucket, key, str(path))

        try:
            for name in FILES:
                fetch(name)
            if TEXTS_FIELD in parse_config((folder / CONFIG_FILE).read_bytes()):
                fetch(TEXTS_FILE)
        except ERRORS as error:
            self._log_unless_missing(error)
            return False
        return True

    def drop(self, digest: str) -> None:
        """Delete a blob's files; versions with its digest then count as unknown."""
        try:
            for name in (*FILES, TEXTS_FILE):
                self._s3.delete_object(Bucket=self._bucket, Key=f"{self._prefix}/blobs/{digest}/{name}")
        except ERRORS as error:
            logger.warning("adapter %.12s cannot be removed from the shared bucket: %s", digest, error)

    def _has(self, key: str) -> bool:
        try:
            self._s3.head_object(Bucket=self._bucket, Key=f"{self._prefix}/{key}")
        except ClientError:
            return False
        return True

    def _version_key(self, version: str) -> str:
        return f"{self._prefix}/versions/{hashlib.sha256(version.encode()).hexdigest()}"

    def _log_unless_missing(self, error: Exception) -> None:
        code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else ""
        if code not in ("404", "NoSuchKey"):
            logger.warning("the shared bucket is not responding: %s", error)
