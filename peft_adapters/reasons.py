"""Reasons for refusing an adapter: collected, grouped, and limited in length, whatever its files contain."""

from __future__ import annotations

from typing import Any


class Reasons:
    """Collects reasons; each is shown once, with the names it concerns. Falsy while empty."""

    MAX_REASONS = 16
    MAX_NAMES = 6

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, reason: str, name: str | None = None) -> None:
        """Add a reason, and the name of the field, module or tensor that it concerns."""
        self._count += 1
        names = self._names.setdefault(reason, [])
        if name is not None:
            names.append(name)

    def render(self) -> list[str]:
        """Return a line per reason, at most MAX_REASONS plus one, with at most MAX_NAMES names each."""
        lines: list[str] = []
        for reason, names in self._names.items():
            shown = ", ".join(map(show, names[: self.MAX_NAMES]))
            more = f" and {len(names) - self.MAX_NAMES} more" if len(names) > self.MAX_NAMES else ""
            lines.append(f"{reason}: {shown}{more}" if names else reason)
        if len(lines) > self.MAX_REASONS:
            lines[self.MAX_REASONS :] = [f"and {len(lines) - self.MAX_REASONS} more reasons"]
        return lines


def show(value: Any) -> str:
    """Return an untrusted value as at most 120 characters of printable ASCII."""
    try:
        text = value if isinstance(value, str) and value.isascii() and value.isprintable() else ascii(value)
    except RecursionError:
        text = "a value that is nested too deeply"
    return text if len(text) <= 120 else text[:117] + "..."
