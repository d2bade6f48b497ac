"""The sources from which adapters are fetched, one file each.

A source implements the protocol `Source`. It does not depend on digests, the catalogue or other sources. A new source
is a file here, a line in `adapter_store.service.Store` and its reference syntax in `protocol.runtime.adapter_refs`.
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
"""The files of every PEFT adapter and of every adapter in the store. Weights in a pickle (`.bin`) are refused."""

_GGUF = re.compile(r"[\w.-]{1,200}\.gguf", re.ASCII)


def choose_weights(names: Iterable[str]) -> str:
    """Return the weights file among file names: PEFT's, else MLX-LM's, else the only GGUF file; "" without any.

    Raises AdapterRefused for several GGUF files.
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
    """Return whether a weights file needs a config; a GGUF file includes everything."""
    return not weights.endswith(GGUF_END)


MORE_FILES = TEXT_FILES
"""Optional files that are fetched, too. No other file of a source is ever read."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """Size and checksum of a version's file, as reported by its source."""

    num_bytes: int
    etag: str = ""  # identifies equal content at the source
    checksum: tuple[Literal["sha256", "md5", "git"], str] | None = None  # hex; None: unknown; git: blob id


@dataclass(frozen=True, slots=True)
class SourceVersion:
    """The content of a target at one time: repeated fetches return the same bytes, or an error."""

    key: str  # equal keys mean equal content
    source: str  # shown to users: "local:NAME", "hub:ORG/NAME@COMMIT", "s3://BUCKET/PREFIX"
    target: str
    files: Mapping[str, RemoteFile] = field(
        default_factory=dict[str, RemoteFile]
    )  # by name: the weights file, its config if it needs one, and existing MORE_FILES
    at_hand: bool = False  # whether it is local: cheap to fetch again, so it is not synced to disk

    @property
    def weights(self) -> str:
        """The name of its weights file."""
        return choose_weights(self.files)


Reader = Literal["anyone", "fleet", "token"]


@dataclass(frozen=True, slots=True)
class SourceAccess:
    """The rights with which a source is read: those of a token, else of the store itself, else of anyone."""

    token: str = field(default="", repr=False)
    as_fleet: bool = False  # with the store's own credentials, unless there is a token

    @property
    def reader(self) -> Reader:
        """The kind of rights: a caller's token, the fleet's own credentials, or none."""
        return "token" if self.token else "fleet" if self.as_fleet else "anyone"


FLEET = SourceAccess(as_fleet=True)


class Source(Protocol):
    """One kind of place that has adapters. Raises LorafleetErrors, retryable if another try may succeed.

    Each is created with a `reserve`: the free-space reserve of the disk to which it fetches; None: nothing is reserved.
    """

    def fixed(self, target: str) -> SourceVersion | None:
        """Return the version of an immutable target without asking the source; None if the target can change.

        The version's `files` are empty.
        """
        ...

    async def resolve(self, target: str, access: SourceAccess = FLEET) -> SourceVersion:
        """Return the version to which `target` currently refers.

        Raises NotFound, PermissionDenied, AdapterRefused if it has no adapter, Unavailable if another try may succeed.
        """
        ...

    async def confirm(self, version: SourceVersion, access: SourceAccess) -> None:
        """Check whether `access` may read the content of a resolved version. Raises as `resolve` if it may not.

        Some sources show a version even to callers that may not read it.
        """
        ...

    async def fetch(
        self, version: SourceVersion, name: str, path: Path, end: int, access: SourceAccess = FLEET
    ) -> None:
        """Download bytes `[0, end)` of the file `name` to `path`, continuing after the bytes already in `path`.

        Never writes more than `end` bytes, whatever the source sends.

        Raises as `resolve`; also Changed if the content is no longer that of `version`, and NoRoom before a piece that
        would violate the source's `reserve`.
        """
        ...


class Changed(Exception):
    """The content is no longer that of the resolved version; the target must be resolved again."""
