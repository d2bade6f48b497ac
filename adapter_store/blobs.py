"""Adapters on disk, by digest: what the store serves. A blob is whole and checked, or it is not there.

Layout under one root: `blobs/<digest>/` with the two files and perhaps texts, `staging/` for what is being fetched,
`versions/` for which digest a source's version turned out to have. All methods block: call them in threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_adapters.format import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    WEIGHTS_FILE,
    TensorInfo,
    adapter_digest,
    canonical_config,
    parse_config,
    parse_header,
)
from peft_adapters.texts import TEXT_FILES, TEXTS_FIELD, TEXTS_FILE, join_texts, split_texts
from protocol.wire.errors import AdapterRefused, Unavailable

logger = logging.getLogger(__name__)

STALE_STAGING_S = 7 * 86_400.0
"""Age at which a download that nobody took up again is thrown away."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A folder with an adapter, its config and header read and found well formed."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    num_bytes: int  # of the weights file

    @classmethod
    def open(cls, folder: Path) -> AdapterFiles:
        """Read config and header. Raises AdapterRefused, OSError."""
        with (folder / CONFIG_FILE).open("rb") as file:
            config = parse_config(file.read(MAX_CONFIG_BYTES + 1))
        with (folder / WEIGHTS_FILE).open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
            tensors = parse_header(head, num_bytes)
        return cls(folder, config, tensors, num_bytes)

    def digest(self) -> str:
        """Hash the content. The file must not be written meanwhile: it is mapped. Raises AdapterRefused, OSError."""
        if TEXTS_FIELD in self.config:
            split_texts((self.folder / TEXTS_FILE).read_bytes(), self.config[TEXTS_FIELD])
        with (
            (self.folder / WEIGHTS_FILE).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
        ):
            return adapter_digest(self.config, self.tensors, view)

    @classmethod
    def open_fetched(cls, folder: Path) -> AdapterFiles:
        """Read what was fetched from a source, making one file of its texts. Raises AdapterRefused, OSError."""
        files = cls.open(folder)
        found = {name: (folder / name).read_bytes() for name in TEXT_FILES if (folder / name).exists()}
        texts = join_texts(found)
        files.config.pop(TEXTS_FIELD, None)
        if texts:
            (folder / TEXTS_FILE).write_bytes(texts)
            files.config[TEXTS_FIELD] = hashlib.sha256(texts).hexdigest()
        return files

    def names(self) -> list[str]:
        """Return the files that make up the adapter."""
        return [CONFIG_FILE, WEIGHTS_FILE, *([TEXTS_FILE] if TEXTS_FIELD in self.config else [])]


class Blobs:
    """The content-addressed folder of one store."""

    def __init__(self, root: Path, quota_bytes: int = 0) -> None:
        """Open or create the folder; throw away what a crash left half done. `quota_bytes` 0: no limit."""
        self._blobs, self._staging, self._versions = root / "blobs", root / "staging", root / "versions"
        self._trash = root / "trash"
        self._quota_bytes = quota_bytes
        self._lock = threading.Lock()
        self._verified: set[str] = set()
        for folder in (self._blobs, self._staging, self._versions, self._trash):
            folder.mkdir(parents=True, exist_ok=True)
        self._sizes: dict[str, int] = {}
        self._clean()

    @property
    def num_bytes(self) -> int:
        """Bytes that the blobs take on disk."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    # ------------------------------------------------------------ what a version holds

    def digest_of(self, version: str) -> str | None:
        """Return the digest that a source's version had when it was taken in, if its blob is still here."""
        try:
            digest = self._version_file(version).read_text()
        except FileNotFoundError:
            return None
        return digest if digest in self._sizes else None

    def _version_file(self, version: str) -> Path:
        return self._versions / hashlib.sha256(version.encode()).hexdigest()

    # ------------------------------------------------------------ writing

    def staging(self, version: str) -> Path:
        """Return the folder to fetch a version into. What an earlier try left there is kept, to go on from."""
        folder = self._staging / hashlib.sha256(version.encode()).hexdigest()
        folder.mkdir(exist_ok=True)
        return folder

    def discard(self, version: str) -> None:
        """Throw away what was fetched of a version."""
        self._remove(self._staging / hashlib.sha256(version.encode()).hexdigest())

    def put(self, version: str, files: AdapterFiles, *, sync: bool) -> str:
        """Take a staged adapter in and return its digest; with `sync` it survives a power cut.

        Raises Unavailable when the quota is too small.
        """
        digest = files.digest()
        config = json.dumps(canonical_config(files.config)).encode()
        (files.folder / CONFIG_FILE).write_bytes(config)
        num_bytes = sum((files.folder / name).stat().st_size for name in files.names())
        self._make_room(num_bytes, keep=digest)
        for name in set(os.listdir(files.folder)).difference(files.names()):
            (files.folder / name).unlink()
        if sync:
            for path in (*(files.folder / name for name in files.names()), files.folder):
                _fsync(path)
        with self._lock:
            if digest in self._sizes:
                self._remove(files.folder)
            else:
                os.rename(files.folder, self._blobs / digest)
                self._sizes[digest] = num_bytes
                self._verified.add(digest)
        if sync:
            _fsync(self._blobs)
        self.note_version(version, digest)
        return digest

    def note_version(self, version: str, digest: str) -> None:
        """Remember which digest a source's version has. Lost in a crash, it only costs reading the source again."""
        self._version_file(version).write_text(digest)

    def _make_room(self, num_bytes: int, keep: str) -> None:
        if not self._quota_bytes:
            return
        if num_bytes > self._quota_bytes:
            raise Unavailable(f"the adapter has {num_bytes} bytes; the store may use {self._quota_bytes}")
        with self._lock:
            for digest in self._by_last_use():
                if self.num_bytes + num_bytes <= self._quota_bytes:
                    return
                if digest != keep:
                    self._evict(digest)

    def _by_last_use(self) -> list[str]:
        return sorted(self._sizes, key=lambda digest: (self._blobs / digest).stat().st_mtime_ns)

    def _evict(self, digest: str) -> None:
        logger.info("evicting adapter %.12s from disk: %d bytes", digest, self._sizes[digest])
        del self._sizes[digest]
        self._verified.discard(digest)
        self._remove(self._blobs / digest)

    # ------------------------------------------------------------ reading

    def open(self, digest: str) -> AdapterFiles | None:
        """Return a blob's files, None if missing or damaged. Raises OSError."""
        if digest not in self._sizes:
            return None
        try:
            return AdapterFiles.open(self._blobs / digest)
        except FileNotFoundError:  # evicted by another thread, or removed by hand
            self.drop(digest)
            return None
        except AdapterRefused as error:
            self._drop_damaged(digest, error)
            return None

    def verified(self, digest: str) -> Path | None:
        """Return the folder of a blob whose content this process has hashed, None if missing or damaged; mark it used.

        A damaged blob is removed, so that it is fetched again.
        """
        if digest not in self._sizes:
            return None
        folder = self._blobs / digest
        try:
            if digest not in self._verified:
                if AdapterFiles.open(folder).digest() != digest:
                    raise AdapterRefused(["its content has another digest"])
                self._verified.add(digest)
            os.utime(folder)
        except FileNotFoundError:  # evicted by another thread, or removed by hand
            self.drop(digest)
            return None
        except AdapterRefused as error:
            self._drop_damaged(digest, error)
            return None
        return folder

    def _drop_damaged(self, digest: str, error: AdapterRefused) -> None:
        logger.error("adapter %.12s is damaged on disk and removed, to be fetched again: %s", digest, error)
        self.drop(digest)

    def drop(self, digest: str) -> int:
        """Remove a blob; return the bytes freed."""
        with self._lock:
            if digest not in self._sizes:
                return 0
            num_bytes = self._sizes[digest]
            self._evict(digest)
            return num_bytes

    # ------------------------------------------------------------ cleaning

    def _clean(self) -> None:
        """Find the blobs; throw away what a crash left half done or half removed."""
        for entry in os.scandir(self._trash):
            shutil.rmtree(entry.path)
        for entry in os.scandir(self._blobs):
            if {CONFIG_FILE, WEIGHTS_FILE} <= set(os.listdir(entry.path)):
                self._sizes[entry.name] = sum(file.stat().st_size for file in os.scandir(entry.path))
            else:
                shutil.rmtree(entry.path)
        for entry in os.scandir(self._staging):
            if entry.stat().st_mtime < time.time() - STALE_STAGING_S:
                shutil.rmtree(entry.path)
        for entry in os.scandir(self._versions):
            if Path(entry.path).read_text(errors="replace") not in self._sizes:
                os.unlink(entry.path)

    def _remove(self, folder: Path) -> None:
        """Remove a folder at once for readers; readers that have a file open keep it."""
        trash = self._trash / f"{folder.name}-{time.monotonic_ns()}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, trash)
            shutil.rmtree(trash)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
