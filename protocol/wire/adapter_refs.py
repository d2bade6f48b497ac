"""References to adapters, `org/name[@revision]` or `hub:…` for the Hub and `s3://bucket/prefix`, and which are allowed.

The gateway decides with it what a request may name, the store what it fetches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from protocol.runtime.settings import Settings, names_of
from protocol.wire.errors import PermissionDenied

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(rf"(?:hub:)?({_NAME})/({_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?")
FOLDER = re.compile(rf"{_NAME}(?:/{_NAME})?")
_S3 = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([A-Za-z0-9!_.*'()/-]{1,900}?)/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A place from which an adapter can be fetched."""

    scheme: Literal["hub", "s3", "local"]
    owner: str  # organisation or bucket; "" for a folder
    path: str  # repository name, key prefix or folder name
    revision: str = ""  # Hub only; "": the default branch

    @property
    def source(self) -> str:
        """Its canonical spelling: "hub:ORG/NAME@REVISION", "s3://BUCKET/PREFIX" or "local:FOLDER"."""
        if self.scheme == "s3":
            return f"s3://{self.owner}/{self.path}"
        if self.scheme == "local":
            return f"local:{self.path}"
        return f"hub:{self.owner}/{self.path}" + (f"@{self.revision}" if self.revision else "")

    @property
    def is_fixed(self) -> bool:
        """Whether it always stands for the same content: true of a Hub commit only."""
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
    """Parse the source of a registration: a reference, or "local:FOLDER", which no request can name."""
    if source.startswith("local:"):
        path = source.removeprefix("local:")
        return Reference("local", "", path) if FOLDER.fullmatch(path) else None
    return parse_reference(source)


@dataclass(frozen=True, slots=True)
class Policy:
    """Which sources are allowed."""

    request_sources: frozenset[str]  # schemes that a request may name without registration
    hub_orgs: frozenset[str]  # empty: any
    s3_buckets: frozenset[str]  # empty: none

    @classmethod
    def of(cls, settings: Settings) -> Policy:
        """Return the policy of the settings."""
        lists = (settings.request_sources, settings.hub_orgs, settings.s3_buckets)
        return cls(*(frozenset(names_of(names)) for names in lists))

    def check(self, reference: Reference, *, on_request: bool) -> None:
        """Raise PermissionDenied unless the reference is allowed; `on_request`: a request names it unregistered."""
        if on_request and reference.scheme not in self.request_sources:
            raise PermissionDenied(f"requests may not name {reference.scheme} adapters here: register it first")
        if reference.scheme == "hub" and self.hub_orgs and reference.owner not in self.hub_orgs:
            raise PermissionDenied(f"adapters of the organisation {reference.owner} are not allowed here")
        if reference.scheme == "s3" and reference.owner not in self.s3_buckets:
            raise PermissionDenied(f"adapters from the bucket {reference.owner} are not allowed here")
