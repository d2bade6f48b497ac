"""Brings a version of an adapter from its source into the blobs: once, checked, in bounded parallelism."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from adapter_store.blobs import AdapterFiles, Blobs
from adapter_store.sources import Changed, Source, Version
from protocol.bus import now_ms
from protocol.errors import AdapterRefused, Unavailable
from protocol.messages import AdapterRecord, ServedModel
from protocol.peft_format import (
    CONFIG_FILE,
    MAX_HEADER_BYTES,
    WEIGHTS_FILE,
    canonical_config,
    parse_config,
    parse_header,
    read_adapter,
)

logger = logging.getLogger(__name__)

HEAD_BYTES = 8 + MAX_HEADER_BYTES
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Taken:
    """A version that is in the blobs."""

    digest: str
    version: Version


class Mirror:
    """Fetches into one store's blobs."""

    def __init__(self, blobs: Blobs, *, max_bytes: int, max_parallel: int = 4) -> None:
        self.blobs = blobs
        self._max_bytes = max_bytes
        self._slots = asyncio.Semaphore(max_parallel)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def take(self, source: Source, target: str, base: ServedModel | None, token: str = "") -> Taken:
        """Make sure that what `target` stands for now is in the blobs.

        A version already there costs no fetch. Raises AdapterRefused before the weights are fetched when their header
        says enough; the source's errors; Changed; Unavailable when the disk is full.
        """
        version = await source.resolve(target, token)
        for name, file in version.files.items():
            if file.num_bytes > self._max_bytes:
                raise AdapterRefused([f"{name} has {file.num_bytes} bytes; the limit is {self._max_bytes}"])
        lock = self._locks.setdefault(version.key, asyncio.Lock())
        async with lock:
            digest = await asyncio.to_thread(self.blobs.digest_of, version.key)
            if digest is None:
                async with self._slots:
                    digest = await self._bring(source, version, base, token)
        return Taken(digest, version)

    async def _bring(self, source: Source, version: Version, base: ServedModel | None, token: str) -> str:
        try:
            folder = await asyncio.to_thread(self.blobs.staging, version.key)
            weights = version.files[WEIGHTS_FILE].num_bytes
            await source.fetch(version, CONFIG_FILE, folder / CONFIG_FILE, version.files[CONFIG_FILE].num_bytes, token)
            await source.fetch(version, WEIGHTS_FILE, folder / WEIGHTS_FILE, min(weights, HEAD_BYTES), token)
            await asyncio.to_thread(_check_head, folder, weights, base)
            await source.fetch(version, WEIGHTS_FILE, folder / WEIGHTS_FILE, weights, token)
            return await asyncio.to_thread(self._finish, version, folder)
        except (AdapterRefused, Changed):
            await asyncio.to_thread(self.blobs.discard, version.key)
            raise
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            await asyncio.to_thread(self.blobs.discard, version.key)
            raise Unavailable("the adapter store's disk is full") from error

    def _finish(self, version: Version, folder: Path) -> str:
        for name, file in version.files.items():
            if file.checksum is not None and _checksum(folder / name, file.checksum[0]) != file.checksum[1]:
                raise Changed(f"{name} of {version.source} does not have the {file.checksum[0]} its source gives")
        return self.blobs.put(version.key, AdapterFiles.open(folder), sync=not version.at_hand)

    async def describe(self, taken: Taken, base: ServedModel) -> AdapterRecord:
        """Check a blob against the base model and return its catalogue record. Raises AdapterRefused, Changed."""
        return await asyncio.to_thread(self._describe, taken, base)

    def _describe(self, taken: Taken, base: ServedModel) -> AdapterRecord:
        files = self.blobs.open(taken.digest)
        if files is None:
            raise Changed(f"adapter {taken.digest:.12} has left the disk")
        spec = read_adapter(files.config, files.tensors, base)
        return AdapterRecord(
            digest=taken.digest,
            rank=spec.rank,
            num_bytes=files.num_bytes,
            config=canonical_config(files.config),
            modules=spec.modules,
            source=taken.version.source,
            created_ms=now_ms(),
        )


def _check_head(folder: Path, num_bytes: int, base: ServedModel | None) -> None:
    """Refuse what config and header already show to be wrong."""
    config = parse_config((folder / CONFIG_FILE).read_bytes())
    with (folder / WEIGHTS_FILE).open("rb") as file:
        tensors = parse_header(file.read(HEAD_BYTES), num_bytes)
    read_adapter(config, tensors, base)


def _checksum(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
