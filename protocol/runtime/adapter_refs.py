"""References to adapters, `org/name[@revision]` or `hub:…` for the Hub and `s3://bucket/prefix`, and their policy.

The gateway checks with it what a request may name, and the store checks what it fetches.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Literal

from protocol.runtime.settings import Settings, names_of
from protocol.wire.errors import PermissionDenied

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(rf"(?:hub:)?({_NAME})/({_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?")
FOLDER = re.compile(rf"{_NAME}(?:/{_NAME})?")
NESTED_FOLDER = re.compile(rf"{_NAME}(?:/{_NAME}){{0,7}}")
"""A folder that a registration may name. Only folders that match FOLDER are served without a registration."""

_S3 = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([A-Za-z0-9!_.*'()/-]{1,900}?)/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


MAX_PATH_CHARACTERS = 1000


def in_root(folder: str) -> bool:
    """Return whether a registration may name this path of a folder within an adapter root."""
    return NESTED_FOLDER.fullmatch(folder) is not None


@dataclass(frozen=True, slots=True)
class Reference:
    """A place from which an adapter can be fetched."""

    scheme: Literal["hub", "s3", "local"]
    owner: str  # organization or bucket; "" for a folder
    path: str  # repository name, key prefix, or folder: its name, or the absolute path of one in a further root
    revision: str = ""  # Hub only; "": the default branch

    @property
    def source(self) -> str:
        """The canonical form: "hub:ORG/NAME@REVISION", "s3://BUCKET/PREFIX" or "local:FOLDER"."""
        if self.scheme == "s3":
            return f"s3://{self.owner}/{self.path}"
        if self.scheme == "local":
            return f"local:{self.path}"
        return f"hub:{self.owner}/{self.path}" + (f"@{self.revision}" if self.revision else "")

    @property
    def place(self) -> str:
        """The name that patterns of visible adapters match, without the revision: ORG/NAME, s3://… or FOLDER."""
        if self.scheme == "local":
            return self.path
        return f"{self.owner}/{self.path}" if self.scheme == "hub" else self.source

    @property
    def is_fixed(self) -> bool:
        """Whether it always refers to the same content, which only a Hub commit does."""
        return _COMMIT.fullmatch(self.revision) is not None


def parse_reference(name: str) -> Reference | None:
    """Parse a name as a reference; None if it is not one."""
    if match := _S3.fullmatch(name):
        path = match[2]
        return None if ".." in path.split("/") or "//" in path else Reference("s3", match[1], path)
    if match := _HUB.fullmatch(name):
        revision = match[3] or ""
        return None if ".." in revision else Reference("hub", match[1], match[2], revision)
    return None


def parse_source(source: str) -> Reference | None:
    """Parse the source of a registration: a reference, or "local:FOLDER", which no request can name.

    A FOLDER in a further root is an absolute path; the caller checks whether the settings contain that root.
    """
    if source.startswith("local:"):
        path = source.removeprefix("local:")
        return Reference("local", "", path) if in_root(path) or _is_whole(path) else None
    return parse_reference(source)


def _is_whole(path: str) -> bool:
    """Return whether a path is absolute and already normalized, judged without access to the disk."""
    is_plain = len(path) <= MAX_PATH_CHARACTERS and path.isprintable() and posixpath.normpath(path) == path
    return path.startswith("/") and not path.startswith("//") and is_plain


@dataclass(frozen=True, slots=True)
class SourcePolicy:
    """Which sources of adapters are allowed."""

    request_sources: frozenset[str]  # schemes that a request may name without registration
    hub_orgs: frozenset[str]  # allowed Hub organizations; empty: all
    s3_buckets: frozenset[str]  # allowed buckets; empty: none
    tenant_places: frozenset[str]  # organizations, s3://BUCKET and s3://BUCKET/PREFIX, see `lends`
    has_tenants: bool  # whether API keys are on

    @classmethod
    def of(cls, settings: Settings) -> SourcePolicy:
        """Return the policy of the settings."""
        lists = (settings.request_sources, settings.hub_orgs, settings.s3_buckets, settings.tenant_places)
        return cls(*(frozenset(names_of(names)) for names in lists), has_tenants=settings.api_keys)

    def lends(self, reference: Reference) -> bool:
        """Return whether the fleet's own credentials may read a place for tenants. For operators they always may."""
        if not self.has_tenants:
            return True
        if reference.scheme != "s3":
            return reference.owner in self.tenant_places
        parts = [reference.owner, *reference.path.split("/")]
        return any(f"s3://{'/'.join(parts[: i + 1])}" in self.tenant_places for i in range(len(parts)))

    def check(self, reference: Reference, *, on_request: bool, as_fleet: bool) -> None:
        """Raise PermissionDenied unless a place is allowed.

        on_request: a request names it without a registration. as_fleet: it is read with the fleet's own credentials.
        """
        if on_request and reference.scheme not in self.request_sources:
            raise PermissionDenied(f"requests may not name {reference.scheme} adapters here: register it first")
        if reference.scheme == "hub" and self.hub_orgs and reference.owner not in self.hub_orgs:
            raise PermissionDenied(f"adapters of the organisation {reference.owner} are not allowed here")
        if reference.scheme == "s3" and reference.owner not in self.s3_buckets:
            raise PermissionDenied(f"adapters from the bucket {reference.owner} are not allowed here")
        if reference.scheme == "s3" and not as_fleet:
            raise PermissionDenied(f"{reference.source:.300} is not among the places in S3 that tenants may read here")
