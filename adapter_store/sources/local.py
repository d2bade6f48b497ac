"""Adapters in folders under one root: `NAME` or `ORG/NAME`, with adapter_config.json or GGUF; deeper if registered.

Folders under further roots are served if they are registered, by absolute path. Nothing outside a folder's root is
read, not even through a symbolic link.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from protocol.runtime.adapter_refs import in_root
from protocol.runtime.free_space import Reserve
from protocol.wire.errors import AdapterRefused, NotFound

PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file's size, times and inode. Any write changes it, since programs cannot set the change time."""

    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp in a file's status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class FolderState:
    """The stamps of one adapter folder's files, or its problem, at one scan."""

    config: Stamp | None = None
    weights: Stamp | None = None
    weights_name: str = WEIGHTS_FILE
    more: tuple[tuple[str, Stamp], ...] = ()  # by name: existing files in MORE_FILES
    problem: str = ""  # why it cannot be an adapter, regardless of its files' content

    @property
    def changed_ns(self) -> int:
        """The unix time of the last change, ns."""
        stamps = (self.config, self.weights, *(stamp for _, stamp in self.more))
        return max((stamp.ctime_ns for stamp in stamps if stamp), default=0)


class LocalSource:
    """The adapters in the folder of the setting `adapters`, and in the folders of `adapter_roots`."""

    def __init__(self, root: Path | None, more: Sequence[Path] = (), *, reserve: Reserve | None = None) -> None:
        """root: None for none. more: further roots. They need not exist yet. reserve: see `Source`."""
        self._reserve = reserve or Reserve(0)
        self.root = _real(root) if root is not None else None
        self._more = [_real(path) for path in more]

    def scan(self) -> dict[str, FolderState]:
        """Return the state of every adapter folder of the first root by name, including invalid names.

        Raises OSError if the root cannot be read.
        """
        states: dict[str, FolderState] = {}
        root = self.root
        if root is None:
            return states
        for entry in _folders(root):
            state = self._state(root, entry.path, entry.is_symlink())
            if state is not None:
                states[entry.name] = state
                continue
            for inner in _folders(entry.path):
                state = self._state(root, inner.path, inner.is_symlink())
                if state is not None:
                    states[f"{entry.name}/{inner.name}"] = state
        return states

    def _state(self, root: Path, folder: str, maybe_outside: bool) -> FolderState | None:
        """Return the state of a folder; None if it has neither adapter_config.json nor GGUF."""
        try:
            if maybe_outside and not _inside(root, folder):
                return FolderState(problem="the folder is a symbolic link that leaves the adapter root")
            config, name = _stamp(root, folder, CONFIG_FILE), WEIGHTS_FILE
            weights = _stamp(root, folder, name)
            if config is None or weights is None:
                name = choose_weights(_names(folder)) or WEIGHTS_FILE
                if config is None and needs_config(name):
                    return None
                weights = _stamp(root, folder, name)
            more = [(name, stamp) for name in MORE_FILES if (stamp := _stamp(root, folder, name))]
            return FolderState(config if needs_config(name) else None, weights, name, tuple(more))
        except AdapterRefused as error:
            return FolderState(problem=error.message)
        except OSError as error:
            return FolderState(problem=f"the folder cannot be read: {error.strerror}")

    # ------------------------------------------------------------ Source

    def fixed(self, target: str) -> SourceVersion | None:
        """Return None: every folder can change."""
        return None

    async def resolve(self, target: str, access: SourceAccess = FLEET) -> SourceVersion:
        """Return the current version of a folder; see `Source.resolve`."""
        return await asyncio.to_thread(self._resolve, target)

    def _place(self, target: str) -> tuple[Path, Path] | None:
        """Return the root of a target's folder and the folder; None if it is in no served root."""
        if not target.startswith("/"):
            return (self.root, self.root / target) if self.root is not None and in_root(target) else None
        for root in self._more:
            if target.startswith(f"{root}/") and in_root(target[len(str(root)) + 1 :]):
                return root, Path(target)
        return None

    def _resolve(self, name: str) -> SourceVersion:
        place = self._place(name)
        state = self._state(place[0], str(place[1]), maybe_outside=True) if place is not None else None
        if place is None or state is None:
            # Tenants see why a name is not served, but no path of this machine.
            raise NotFound(f"there is no adapter folder {os.path.basename(name) if name.startswith('/') else name!r}")
        if state.problem:
            raise AdapterRefused([state.problem])
        if state.weights is None:
            raise AdapterRefused([_why_no_weights(place[1])])
        config = {CONFIG_FILE: RemoteFile(state.config.num_bytes, str(state.config))} if state.config else {}
        return SourceVersion(
            key=f"local:{place[0]}:{name}:{state.config}:{state.weights}" + "".join(f":{part}" for part in state.more),
            source=f"local:{name}",
            target=name,
            at_hand=True,
            files={
                **config,
                state.weights_name: RemoteFile(state.weights.num_bytes, str(state.weights)),
                **{name: RemoteFile(stamp.num_bytes, str(stamp)) for name, stamp in state.more},
            },
        )

    async def confirm(self, version: SourceVersion, access: SourceAccess) -> None:
        """Do nothing: gateways decide who may name a folder."""

    async def fetch(
        self, version: SourceVersion, name: str, path: Path, end: int, access: SourceAccess = FLEET
    ) -> None:
        """Copy a part of a file; see `Source.fetch`."""
        await asyncio.to_thread(self._copy, version, name, path, end)

    def _copy(self, version: SourceVersion, name: str, path: Path, end: int) -> None:
        place = self._place(version.target)
        real = os.path.realpath(place[1] / name) if place is not None else ""
        if place is None or not _inside(place[0], real):
            raise Changed
        source = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with path.open("ab") as out:
                at = out.tell()
                while at < end and (chunk := os.pread(source, min(end - at, CHUNK_BYTES), at)):
                    self._reserve.check(path, len(chunk))
                    out.write(chunk)
                    at += len(chunk)
            # Compared last: if the stamp is unchanged, all bytes copied before belong to the version.
            if str(Stamp.of(os.fstat(source))) != version.files[name].etag:
                raise Changed
        finally:
            os.close(source)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path.expanduser()))


def _stamp(root: Path, folder: str, name: str) -> Stamp | None:
    path = os.path.join(folder, name)
    try:
        status = os.stat(path, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            if not _inside(root, path):
                raise AdapterRefused([f"{name} is a symbolic link that leaves the adapter root"])
            status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise AdapterRefused([f"{name} is not a regular file"])
    return Stamp.of(status)


def _inside(root: Path, path: str) -> bool:
    return os.path.commonpath((os.path.realpath(path), root)) == str(root)


def _why_no_weights(folder: Path) -> str:
    for pickle in PICKLES:
        if (folder / pickle).exists():
            return f"{pickle} is a pickle, which can run code: convert it to {WEIGHTS_FILE}"
    return f"{WEIGHTS_FILE} is missing"


def _names(folder: str) -> list[str]:
    """Return the names in a folder, none if it does not exist."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _folders(path: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """Yield the subfolders of `path` that are not hidden."""
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir():
                yield entry
