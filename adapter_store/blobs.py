"""The adapters on a store's disk, by digest. A blob is either complete and checked, or absent.

Layout under one root: `blobs/<digest>/` has the config, the weights and, if the adapter has any, its texts. `staging/`
has fetches in progress, `versions/` maps a source's version to its digest, and `trash/` has folders being deleted. All
methods block and must be called in threads.
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
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from peft_adapters.effect import check_idle, has_effect
from peft_adapters.format import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    WEIGHTS_FILE,
    AdapterSpec,
    TensorInfo,
    adapter_digest,
    canonical_config,
    parse_config,
    parse_header,
)
from peft_adapters.kinds.converted import written_converted
from peft_adapters.texts.files import TEXT_FILES, TEXTS_FIELD, TEXTS_FILE, OwnTexts, parse_texts, read_texts
from protocol.runtime.file_locks import flush
from protocol.runtime.free_space import Reserve, size_of
from protocol.wire.errors import AdapterRefused, Unavailable

logger = logging.getLogger(__name__)

STALE_STAGING_S = 86_400.0
"""Seconds after which an abandoned download is deleted."""

MAX_BASE_NAME = 300
"""Maximum characters of a base's name or path in an adapter's config; longer ones are ignored."""

BASE_LINE = "base "
"""Prefix of the line in a version's note with the base that the version names; other lines are readers."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder with an adapter, and its parsed config, weights header and texts."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    num_bytes: int  # size of the weights file
    texts: OwnTexts | None = None  # its template, special and added tokens; None: it has none

    @classmethod
    def open(cls, folder: Path) -> AdapterFolder:
        """Parse the files of a blob, and check the texts against the config's hash. Raises AdapterRefused, OSError."""
        files = cls.read(folder)
        if TEXTS_FIELD not in files.config:
            return files
        return replace(files, texts=parse_texts((folder / TEXTS_FILE).read_bytes(), files.config[TEXTS_FIELD]))

    @classmethod
    def read(cls, folder: Path) -> AdapterFolder:
        """Parse the config and the header of the weights in any folder. Raises AdapterRefused, OSError."""
        with (folder / CONFIG_FILE).open("rb") as file:
            config = parse_config(file.read(MAX_CONFIG_BYTES + 1))
        with (folder / WEIGHTS_FILE).open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
            tensors = parse_header(head, num_bytes)
        return cls(folder, config, tensors, num_bytes)

    def digest(self) -> str:
        """Return the digest of the content.

        The weights are memory-mapped, so they must not be written meanwhile. Raises AdapterRefused, OSError.
        """
        with (
            (self.folder / WEIGHTS_FILE).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
        ):
            return adapter_digest(self.config, self.tensors, view)

    def has_effect(self, spec: AdapterSpec) -> bool:
        """Return whether the adapter, parsed as `spec`, can change any output. Raises OSError."""
        with self._weights() as weights:
            return has_effect(spec, self.tensors, weights)

    def check_idle(self, spec: AdapterSpec) -> None:
        """Raise as `peft_adapters.effect.check_idle`, and OSError."""
        if spec.idle:
            with self._weights() as weights:
                check_idle(spec, self.tensors, weights)

    @contextlib.contextmanager
    def _weights(self) -> Generator[memoryview]:
        with (
            (self.folder / WEIGHTS_FILE).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
            memoryview(view) as weights,
        ):
            yield weights

    @classmethod
    def open_fetched(cls, folder: Path) -> AdapterFolder:
        """Parse the files of an adapter fetched from a source. Raises AdapterRefused, OSError."""
        files = cls.read(folder)
        files.config.pop(TEXTS_FIELD, None)
        return replace(files, texts=texts_in(folder))

    def keep_texts(self) -> None:
        """Merge the relevant parts of the text files into the blob's one text file; put its hash into the config."""
        if self.texts is not None:
            raw = msgspec.json.encode(self.texts)
            (self.folder / TEXTS_FILE).write_bytes(raw)
            self.config[TEXTS_FIELD] = hashlib.sha256(raw).hexdigest()

    def names(self) -> list[str]:
        """Return the names of the files that make up the adapter."""
        return [CONFIG_FILE, WEIGHTS_FILE, *([TEXTS_FILE] if TEXTS_FIELD in self.config else [])]


def texts_in(folder: Path) -> OwnTexts | None:
    """Return the relevant parts of a source's text files, None without any. Raises AdapterRefused, OSError."""
    return read_texts({name: (folder / name).read_bytes() for name in TEXT_FILES if (folder / name).exists()})


def named_in(config: Mapping[str, object]) -> str:
    """Return the base's name in a config; "" if it is not a printable string within the length limit."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and len(name) <= MAX_BASE_NAME and name.isprintable() else ""


class Blobs:
    """The content-addressed folder of one store."""

    def __init__(self, root: Path, quota_bytes: int = 0, reserve: Reserve | None = None) -> None:
        """Open or create the folder `root`, and delete what a crash left unfinished.

        quota_bytes: maximum bytes of all blobs, beyond which the least recently used are evicted; 0: no limit. reserve:
        free-space reserve of the disk; None: nothing is reserved.
        """
        self.reserve = reserve or Reserve(0)
        self._blobs, self._staging, self._versions = root / "blobs", root / "staging", root / "versions"
        self._trash = root / "trash"
        self._quota_bytes = quota_bytes
        self._lock = threading.Lock()
        self._notes_lock = threading.RLock()  # threads read and write notes of the same version concurrently
        self._verified: set[str] = set()
        for folder in (self._blobs, self._staging, self._versions, self._trash):
            folder.mkdir(parents=True, exist_ok=True)
        self._sizes: dict[str, int] = {}
        self._clean()

    @property
    def num_bytes(self) -> int:
        """The bytes that all blobs take on disk."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        """Return the number of blobs."""
        return len(self._sizes)

    def __contains__(self, digest: str) -> bool:
        """Return whether the blob is on disk."""
        return digest in self._sizes

    # ------------------------------------------------------------ versions

    def digest_of(self, version: str) -> str | None:
        """Return the digest of a source's version as fetched; None unless its blob is still on disk.

        Does not check who may read the version.
        """
        digest, _ = self._note_of(version)
        return digest if digest in self._sizes else None

    def readers_of(self, version: str) -> set[str]:
        """Return the kinds of `Reader` that have read a version. Tokens are never recorded."""
        return {note for note in self._note_of(version)[1] if not note.startswith(BASE_LINE)}

    def note_reader(self, version: str, reader: str) -> None:
        """Record that a version with a digest here was read with the rights of `reader`."""
        with self._notes_lock:
            digest, notes = self._note_of(version)
            if digest and reader not in notes:
                self._write_note(version, digest, {*notes, reader})

    def named_base(self, version: str) -> str:
        """Return the `base_model_name_or_path` in the config of a version with a digest here, "" without one.

        Blobs do not contain it, so that contents which differ in nothing else are the same.
        """
        notes = self._note_of(version)[1]
        return next((note.removeprefix(BASE_LINE) for note in notes if note.startswith(BASE_LINE)), "")

    def _write_note(self, version: str, digest: str, notes: Iterable[str]) -> None:
        self._version_file(version).write_text("\n".join([digest, *sorted(notes)]))

    def _note_of(self, version: str) -> tuple[str, set[str]]:
        """Return a version's digest and the other lines of its note; "" and an empty set without a note."""
        try:
            with self._notes_lock:  # so that a half-written note is never read
                digest, *notes = self._version_file(version).read_text(errors="replace").split("\n")
        except FileNotFoundError:
            return "", set()
        return digest, set(notes)

    def _version_file(self, version: str) -> Path:
        return self._versions / hashlib.sha256(version.encode()).hexdigest()

    # ------------------------------------------------------------ writing

    def staging(self, version: str) -> Path:
        """Return the folder for fetching a version; a fetch resumes from files that an earlier one has left there."""
        folder = self._staging / hashlib.sha256(version.encode()).hexdigest()
        with self._lock:  # not while `sweep` deletes it
            folder.mkdir(exist_ok=True)
            os.utime(folder)
        return folder

    def discard(self, version: str) -> None:
        """Delete the staged files of a version."""
        self._remove(self._staging / hashlib.sha256(version.encode()).hexdigest())

    def put(self, version: str, files: AdapterFolder, named: str = "", *, sync: bool) -> str:
        """Move a staged adapter into the blobs and return its digest. sync: make it survive a power loss.

        named: the base that the version names. Raises Unavailable if the adapter is larger than the quota.
        """
        digest = files.digest()
        config = json.dumps(canonical_config(files.config) | written_converted(files.config, files.tensors)).encode()
        (files.folder / CONFIG_FILE).write_bytes(config)
        num_bytes = sum((files.folder / name).stat().st_size for name in files.names())
        self._make_room(num_bytes, keep=digest)
        for name in set(os.listdir(files.folder)).difference(files.names()):
            (files.folder / name).unlink()
        if sync:
            for path in (*(files.folder / name for name in files.names()), files.folder):
                flush(path)
        with self._lock:
            if digest in self._sizes:
                self._remove(files.folder)
            else:
                os.rename(files.folder, self._blobs / digest)
                self._sizes[digest] = num_bytes
                self._verified.add(digest)
        if sync:
            flush(self._blobs)
        self.note_version(version, digest, named)
        return digest

    def note_version(self, version: str, digest: str, named: str = "") -> None:
        """Record the digest of a source's version, and the base that it names, one line of text.

        If a crash loses the record, the version is only fetched again.
        """
        with self._notes_lock:
            readers = self.readers_of(version) if self._note_of(version)[0] == digest else ()
            self._write_note(version, digest, {*readers, f"{BASE_LINE}{named}"})

    def room(self, num_blob: int, num_staged: int, folder: Path) -> AbstractContextManager[None]:
        """Reserve disk space for an adapter that is staged in a folder, until the block ends.

        num_blob: bytes of its files as a blob. num_staged: maximum bytes of all files in its folder at one time,
        including existing ones. Raises Unavailable if the blob exceeds the quota, NoRoom if the disk lacks the space.
        """
        if self._quota_bytes and num_blob > self._quota_bytes:
            raise Unavailable(f"the adapter has {num_blob} bytes; the store may use {self._quota_bytes}")
        return self.reserve.room(self._staging, lambda: max(0, num_staged - size_of(folder)))

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
        return sorted(self._sizes, key=lambda digest: _used_ns(self._blobs / digest))

    def _evict(self, digest: str) -> None:
        logger.info("evicting adapter %.12s from disk: %d bytes", digest, self._sizes[digest])
        del self._sizes[digest]
        self._verified.discard(digest)
        self._remove(self._blobs / digest)

    # ------------------------------------------------------------ reading

    def open(self, digest: str) -> AdapterFolder | None:
        """Return a blob's parsed folder; None if it is missing or damaged. Raises OSError."""
        if digest not in self._sizes:
            return None
        try:
            return AdapterFolder.open(self._blobs / digest)
        except FileNotFoundError:  # evicted by another thread, or deleted by hand
            self.drop(digest)
            return None
        except AdapterRefused as error:
            self._drop_damaged(digest, error)
            return None

    def verified(self, digest: str) -> Path | None:
        """Return a blob's folder and mark it as used; None if it is missing or damaged.

        A process hashes the content at its first call for a digest. A damaged blob is deleted, so that it is fetched
        again.
        """
        if digest not in self._sizes:
            return None
        folder = self._blobs / digest
        try:
            if digest not in self._verified:
                if AdapterFolder.open(folder).digest() != digest:
                    raise AdapterRefused(["its content has another digest"])
                self._verified.add(digest)
            os.utime(folder)
        except FileNotFoundError:  # evicted by another thread, or deleted by hand
            self.drop(digest)
            return None
        except AdapterRefused as error:
            self._drop_damaged(digest, error)
            return None
        return folder

    def _drop_damaged(self, digest: str, error: AdapterRefused) -> None:
        logger.error("adapter %.12s is damaged on disk; it is deleted and fetched again: %s", digest, error)
        self.drop(digest)

    def drop(self, digest: str) -> int:
        """Delete a blob; return the bytes freed."""
        with self._lock:
            if digest not in self._sizes:
                return 0
            num_bytes = self._sizes[digest]
            self._evict(digest)
            return num_bytes

    # ------------------------------------------------------------ cleaning

    def _clean(self) -> None:
        """List the blobs, and delete half-written and half-deleted ones left by a crash."""
        for entry in os.scandir(self._trash):
            shutil.rmtree(entry.path)
        for entry in os.scandir(self._blobs):
            if {CONFIG_FILE, WEIGHTS_FILE} <= set(os.listdir(entry.path)):
                self._sizes[entry.name] = sum(file.stat().st_size for file in os.scandir(entry.path))
            else:
                shutil.rmtree(entry.path)
        self.sweep()
        for entry in os.scandir(self._versions):
            if Path(entry.path).read_text(errors="replace").partition("\n")[0] not in self._sizes:
                os.unlink(entry.path)

    def sweep(self) -> None:
        """Delete downloads that nobody has begun or resumed for STALE_STAGING_S."""
        for folder in list(self._staging.iterdir()):
            with self._lock, contextlib.suppress(FileNotFoundError):  # a fetch has discarded it
                if folder.stat().st_mtime < time.time() - STALE_STAGING_S:
                    self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Delete a folder, atomically for readers; those that have a file open can finish reading it."""
        trash = self._trash / f"{folder.name}-{time.monotonic_ns()}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, trash)
            shutil.rmtree(trash)


def _used_ns(folder: Path) -> int:
    """Return when a blob was last used, ns; 0 if its folder was deleted by hand, so that it is evicted first."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
