"""A page of a list in the format of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def list_page(data: Sequence[dict[str, Any]], *, has_more: bool, last_id: str | None = None) -> dict[str, Any]:
    """Return a page of objects, each of which has an `id`.

    last_id: cursor of the next page; None for the last object's id.
    """
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": last_id or (data[-1]["id"] if data else None),
        "has_more": has_more,
    }
