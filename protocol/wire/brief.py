"""Values of strangers in messages: as Python writes them, but cut before they are written, not after."""

from __future__ import annotations

from itertools import islice
from reprlib import Repr
from typing import Any


class _Short(Repr):
    """Writes a few entries of anything, so that a value of any size costs the same."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = 4
        self.maxstring = self.maxother = self.maxlong = most

    def repr_str(self, x: str, level: int) -> str:
        """Return the beginning of a text."""
        return repr(x[: self.maxstring])

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Return the first entries of an object, in their order: the library would sort all of them."""
        first = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in islice(x, self.maxdict)]
        more = [self.fillvalue] if len(x) > self.maxdict else []
        return "{" + ", ".join([*first, *more] if level > 0 else [self.fillvalue]) + "}" if x else "{}"


def brief(value: Any, most: int = 100) -> str:
    """Return a value for a message, in at most `most` characters."""
    return _Short(most).repr(value)[:most]
