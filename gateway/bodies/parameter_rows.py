"""One row of the list of parameters: what becomes of a name in an object. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["served", "accepted", "refused"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one or more objects."""

    name: str
    objects: Sequence[str]  # of `parameters.OBJECTS`: where it is a field
    servers: frozenset[str]  # who knows it; none: only this project
    fate: Fate = "served"
    why: str = ""  # why it has no effect, or is refused: a sentence without its subject, the parameter
    neutral: Sequence[Any] = ()  # values at which a refused parameter has no effect, and is accepted; null always is
    holds: str = ""  # of `OBJECTS` or `BY_TYPE`: what its value is, or each entry of a list

    def has_effect(self, value: Any) -> bool:
        """Return whether the parameter would change anything at this value."""
        return self.fate == "refused" and value is not None and value not in self.neutral


def rows(
    names: str, objects: str, servers: str, fate: Fate = "served", why: str = "", neutral: Sequence[Any] = (),
    holds: str = "",
) -> Iterable[Parameter]:  # fmt: skip
    """Return a parameter for each of the names."""
    for name in names.split():
        yield Parameter(name, objects.split(), frozenset(servers.split()), fate, why, neutral, holds)


def accepted(names: str, objects: str, servers: str, why: str) -> Iterable[Parameter]:
    """Return rows of parameters that are accepted without effect."""
    return rows(names, objects, servers, "accepted", why)


def refused(names: str, objects: str, servers: str, why: str, *neutral: Any) -> Iterable[Parameter]:
    """Return rows of parameters that are refused, but for their neutral values."""
    return rows(names, objects, servers, "refused", why, neutral)


OWN = ""
"""The servers of a parameter that only this project has."""

NO_IMAGES = "is about images, sounds or videos, and only texts are served"
LONG = "asks for a conversation to be shortened, which clients do themselves here"
