"""Short representations of untrusted values for messages.

A value is cut before it is formatted, so that a large one costs no more than a small one.
"""

from __future__ import annotations

from itertools import islice
from reprlib import Repr
from typing import Any


class _Short(Repr):
    """Formats only the first entries of a container, so that the cost does not depend on the value's size."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = 4
        self.maxstring = self.maxother = self.maxlong = most

    def repr_str(self, x: str, level: int) -> str:
        """Return the representation of the beginning of a string."""
        return repr(x[: self.maxstring])

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Return the first entries of a dict in insertion order; `Repr` itself would sort all of them."""
        first = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in islice(x, self.maxdict)]
        more = [self.fillvalue] if len(x) > self.maxdict else []
        return "{" + ", ".join([*first, *more] if level > 0 else [self.fillvalue]) + "}" if x else "{}"


def brief(value: Any, most: int = 100) -> str:
    """Return a Python-like representation of `value`, at most `most` characters long."""
    return _Short(most).repr(value)[:most]
