"""How deep JSON is nested. Pure."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a body; everything that reads bodies later can take that much."""


def is_deeper(value: Any, limit: int) -> bool:
    """Return whether lists and objects are nested more than `limit` deep."""
    level = [value]
    for _ in range(limit):
        level = [
            inner for outer in level if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]  # fmt: skip
        if not level:
            return False
    return True
