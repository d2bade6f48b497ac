"""How a Lua script is called: the base class of signatures, and the order of keys and arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, TypeAlias, get_args, get_origin, get_type_hints

import msgspec
from msgspec.structs import astuple

Key: TypeAlias = Annotated[str, "a key of the queue"]
Word: TypeAlias = str | bytes | int

_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")  # matches between the words of a class name


class Group(msgspec.Struct):  # a struct, like `Call`: a dataclass takes three times as long to create
    """Consecutive arguments of a script, in the order of the fields."""


class Call(msgspec.Struct):
    """A call of a script. `Scripts` adds the first key, the prefix of the shard's keys."""

    @classmethod
    def script(cls) -> str:
        """Return the name of the script."""
        return _WORDS.sub("_", cls.__name__).lower()

    def laid_out(self) -> list[Any]:
        """Return the keys, then the arguments, in the order in which the script reads them."""
        _, num_single, have_groups = shape_of(type(self))
        values = astuple(self)
        found = [*values[:num_single]]
        for items, has_groups in zip(values[num_single:], have_groups, strict=True):
            if not has_groups:
                found += items
                continue
            for item in items:
                found += astuple(item)
        return found


@cache
def shape_of(kind: type[Call]) -> tuple[int, int, tuple[bool, ...]]:
    """Return the number of keys, the number of fields before the lists, and for each list whether it holds groups."""
    hints = list(get_type_hints(kind, include_extras=True).values())
    lists = [hint for hint in hints if get_origin(hint) is Sequence]
    items = [get_args(hint)[0] for hint in lists]
    groups = tuple(isinstance(item, type) and issubclass(item, Group) for item in items)
    return sum(hint is Key for hint in hints), len(hints) - len(lists), groups
