"""The sources that adapters are fetched from, one file each.

A source implements the protocol `Source`. It knows nothing of digests, the catalogue or other sources. A new one is a
file here, a line in `adapter_store.service.Store` and its reference syntax in `protocol.runtime.adapter_refs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.formats.gguf import GGUF_END
from peft_adapters.formats.mlx import MLX_WEIGHTS
from peft_adapters.texts.files import TEXT_FILES
from protocol.wire.errors import AdapterRefused

FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""The files that every adapter of PEFT has, and every one in the store. Weights in a pickle (`.bin`) are refused."""

_GGUF = re.compile(r"[\w.-]{1,200}\.gguf", re.ASCII)


def choose_weights(names: Iterable[str]) -> str:
    """Return the weights file among the names of a source's files: PEFT's, else MLX-LM's, else the only one in GGUF.

    "" if there is none. Raises AdapterRefused for several in GGUF.
    """
    found = set(names)
    for name in (WEIGHTS_FILE, MLX_WEIGHTS):
        if name in found:
            return name
    gguf = sorted(name for name in found if _GGUF.fullmatch(name))
    if len(gguf) > 1:
        raise AdapterRefused(
            [f"there are {len(gguf)} GGUF files, but an adapter must be a single one: {', '.join(gguf)[:200]}"]
        )
    return gguf[0] if gguf else ""


def needs_config(weights: str) -> bool:
    """Return whether a config belongs to a weights file; one in GGUF has all that counts in it."""
    return not weights.endswith(GGUF_END)


MORE_FILES = TEXT_FILES
"""The optional files that are fetched, too. No other file of a source is ever read."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """Size and checksum of one file of a version, as its source states them."""

    num_bytes: int
    etag: str = ""  # identifies equal content at the source
    checksum: tuple[Literal["sha256", "md5", "git"], str] | None = None  # hex, if the source knows it; git: blob id


@dataclass(frozen=True, slots=True)
class SourceVersion:
    """The content of a target at one time: fetching it twice gives the same bytes, or an error."""

    key: str  # equal keys mean equal content
    source: str  # name shown to users: "local:NAME", "hub:ORG/NAME@COMMIT", "s3://BUCKET/PREFIX"
    target: str
    files: Mapping[str, RemoteFile] = field(
        default_factory=dict[str, RemoteFile]
    )  # by name: a weights file, its config if it needs one, and existing MORE_FILES
    at_hand: bool = False  # True if local: cheap to fetch again, so it needs no sync to disk

    @property
    def weights(self) -> str:
        """The name of its weights file."""
        return choose_weights(self.files)


Reader = Literal["anyone", "fleet", "token"]


@dataclass(frozen=True, slots=True)
class SourceAccess:
    """By whose rights a source is read: those of a token, else of the store itself, else of anyone."""

    token: str = field(default="", repr=False)
    as_fleet: bool = False  # with the store's own credentials, unless there is a token

    @property
    def reader(self) -> Reader:
        """The kind of rights: of a caller's token, of the fleet's own credentials, or of anyone."""
        return "token" if self.token else "fleet" if self.as_fleet else "anyone"


FLEET = SourceAccess(as_fleet=True)


class Source(Protocol):
    """One kind of place that holds adapters. Its errors are LorafleetErrors, retryable if another try may succeed.

    It is made with a `reserve`: what it leaves free of the disk that it fetches to, None for nothing.
    """

    def fixed(self, target: str) -> SourceVersion | None:
        """Return the version of a target that can never change, without asking the source; None if it can change.

        The version's `files` are empty.
        """
        ...

    async def resolve(self, target: str, access: SourceAccess = FLEET) -> SourceVersion:
        """Return the version that `target` refers to now.

        Raises NotFound, PermissionDenied, AdapterRefused when it holds no adapter, Unavailable when another try may
        succeed.
        """
        ...

    async def confirm(self, version: SourceVersion, access: SourceAccess) -> None:
        """Ask whether `access` may read the content of a resolved version. Raises as `resolve` if it may not.

        Some sources show a version to more than may read it.
        """
        ...

    async def fetch(
        self, version: SourceVersion, name: str, path: Path, end: int, access: SourceAccess = FLEET
    ) -> None:
        """Download bytes `[0, end)` of the file `name` to `path`, continuing after those that `path` already holds.

        Never more than `end` bytes are written, whatever the source sends.

        Raises as `resolve`; also Changed when the content is no longer that of `version`, and NoRoom before a piece
        that would take what the source's `reserve` keeps free.
        """
        ...


class Changed(Exception):
    """The content is no longer that of the resolved version; the target must be resolved again."""
