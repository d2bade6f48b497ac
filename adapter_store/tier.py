"""A bucket that several stores share: what one has taken in, the others need not fetch from its source again."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from adapter_store.sources import FILES
from peft_adapters.format import CONFIG_FILE, parse_config
from peft_adapters.texts import TEXTS_FIELD, TEXTS_FILE
from protocol.wire.adapter_refs import parse_reference
from protocol.wire.errors import BadRequest

logger = logging.getLogger(__name__)

ERRORS = (BotoCoreError, ClientError, Boto3Error)


class Tier:
    """Blobs and versions in S3, in the layout of `Blobs`. All methods block; failures are logged, never raised:
    without the bucket a store does what it would do alone."""

    def __init__(self, client: Any, url: str) -> None:
        """`url` is s3://bucket/prefix. Raises BadRequest."""
        reference = parse_reference(url)
        if reference is None or reference.scheme != "s3":
            raise BadRequest(f"store_bucket {url!r} is not of the form s3://bucket/prefix")
        self._s3 = client
        self._bucket, self._prefix = reference.owner, reference.path

    def push(self, version: str, digest: str, folder: Path) -> None:
        """Put a blob in, and which version it is; large files in parts."""
        try:
            for name in (*FILES, *([TEXTS_FILE] if (folder / TEXTS_FILE).exists() else [])):
                if not self._has(f"blobs/{digest}/{name}"):
                    self._s3.upload_file(str(folder / name), self._bucket, f"{self._prefix}/blobs/{digest}/{name}")
            self._s3.put_object(Bucket=self._bucket, Key=self._version_key(version), Body=digest.encode())
        except ERRORS as error:
            logger.warning("adapter %.12s does not get into the shared bucket: %s", digest, error)

    def digest_of(self, version: str) -> str | None:
        """Return the digest that some store found a source's version to have."""
        try:
            reply = self._s3.get_object(Bucket=self._bucket, Key=self._version_key(version))
            return reply["Body"].read().decode()
        except ERRORS as error:
            self._log_unless_missing(error)
            return None

    def pull(self, digest: str, folder: Path) -> bool:
        """Fetch a blob's files into a folder; tell whether they are there. Their content is the caller's to check."""

        def fetch(name: str) -> None:
            self._s3.download_file(self._bucket, f"{self._prefix}/blobs/{digest}/{name}", str(folder / name))

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
        """Remove a blob's files; the versions that name it then mean nothing."""
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
            logger.warning("the shared bucket does not answer: %s", error)
