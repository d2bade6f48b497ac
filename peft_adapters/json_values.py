"""Untrusted JSON: strict parsing, and checks of values by type."""

from __future__ import annotations

import json
from typing import Any, TypeGuard

from protocol.wire.errors import AdapterRefused


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Return whether a JSON value is a list."""
    return isinstance(value, list)


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Return whether a JSON value is an object."""
    return isinstance(value, dict)


def load_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys. what: its name in errors. Raises AdapterRefused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        detail = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise AdapterRefused([f"{what} is not valid JSON: {detail}"]) from None
    if not is_object(value):
        raise AdapterRefused([f"{what} is not a JSON object"])
    return value
