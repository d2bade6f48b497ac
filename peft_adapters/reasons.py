"""Why an adapter is refused: collected, grouped, and short enough to be shown whoever wrote the adapter."""

from __future__ import annotations

import json
from typing import Any

from protocol.wire.errors import AdapterRefused


class Reasons:
    """Collects what is wrong, the same reason once with the names it concerns; bounded when rendered."""

    MAX_REASONS = 16
    MAX_NAMES = 6

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, reason: str, name: str | None = None) -> None:
        self._count += 1
        names = self._names.setdefault(reason, [])
        if name is not None:
            names.append(name)

    def render(self) -> list[str]:
        """Return one line per reason."""
        lines: list[str] = []
        for reason, names in self._names.items():
            shown = ", ".join(map(show, names[: self.MAX_NAMES]))
            more = f" and {len(names) - self.MAX_NAMES} more" if len(names) > self.MAX_NAMES else ""
            lines.append(f"{reason}: {shown}{more}" if names else reason)
        if len(lines) > self.MAX_REASONS:
            lines[self.MAX_REASONS :] = [f"and {len(lines) - self.MAX_REASONS} more reasons"]
        return lines


def show(value: Any) -> str:
    """Return a value from a stranger's file as short printable ASCII."""
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() else ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."


def load_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object in which no key appears twice. Raises AdapterRefused."""

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
    if not isinstance(value, dict):
        raise AdapterRefused([f"{what} is not a JSON object"])
    return value
