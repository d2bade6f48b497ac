"""Where adapters come from. A source is one file here, and knows nothing of digests, catalogue or other sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.texts import TEXT_FILES

FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""What every adapter has. A pickle (`.bin`) is refused by its name."""

MORE_FILES = TEXT_FILES
"""What is taken from a source besides, if it is there. Nothing else ever is."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a version."""

    num_bytes: int
    etag: str = ""  # what the source says when asked for the same version again
    checksum: tuple[Literal["sha256", "md5", "git"], str] | None = None  # hex, if the source knows it; git: blob id


@dataclass(frozen=True, slots=True)
class Version:
    """One fixed content of a target: fetched twice, it gives the same bytes or an error."""

    key: str  # equal keys, equal content
    source: str  # as shown to users: "local:NAME", "hub:ORG/NAME@COMMIT", "s3://BUCKET/PREFIX"
    target: str
    files: Mapping[str, RemoteFile] = field(default_factory=dict)  # by name: FILES, and what there is of MORE_FILES
    at_hand: bool = False  # fetching it again costs next to nothing: not worth syncing to disk


class Source(Protocol):
    """One kind of place. Errors are LorafleetErrors: retryable ones are worth another try, the others say why not."""

    def fixed(self, target: str) -> Version | None:
        """Return the version of a target that always means the same content, without asking; its files are unknown."""
        ...

    async def resolve(self, target: str, token: str = "") -> Version:
        """Return what `target` stands for now.

        Raises NotFound, PermissionDenied, AdapterRefused (it holds no adapter), Unavailable (ask again later).
        """
        ...

    async def fetch(self, version: Version, name: str, path: Path, end: int, token: str = "") -> None:
        """Make the file at `path` hold bytes `[0, end)` of the file `name`, going on from those it already holds.

        Raises as `resolve`; also Unavailable when the content is no longer that of `version`.
        """
        ...


class Changed(Exception):
    """The content is no longer that of the version that was resolved: resolve again."""
