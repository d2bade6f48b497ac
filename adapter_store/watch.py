"""Decides from successive scans which adapter folders are complete, changed or removed. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapter_store.sources.local import FolderState


@dataclass(slots=True)
class Changes:
    """The differences that one scan has found, as adapter names."""

    appeared: list[str] = field(default_factory=list[str])  # first seen
    settled: list[str] = field(default_factory=list[str])  # complete, and new or changed since it last settled
    removed: list[str] = field(default_factory=list[str])


class Watch:
    """Compares each scan of the adapter folders with the earlier ones.

    A folder is settled if nothing in it has changed between two scans, or for `settle_ns` before the first. A folder is
    removed if two consecutive scans miss it, so that replacing a folder by another of the same name removes nothing.
    """

    def __init__(self, settle_ns: int, known: Iterable[str] = ()) -> None:
        """Start with the earlier `known` names: they are reported as removed if no scan finds them."""
        self._settle_ns = settle_ns
        self._last = {name: FolderState() for name in known}
        self._settled: dict[str, FolderState] = {}
        self._missing: set[str] = set()

    def observe(self, seen: Mapping[str, FolderState], now_ns: int) -> Changes:
        """Compare a scan at unix time `now_ns` with the last one; return what changed."""
        changes = Changes()
        for name, state in seen.items():
            last = self._last.get(name)
            if last is None:
                changes.appeared.append(name)
            if state == self._settled.get(name):
                continue
            if state == last or state.changed_ns + self._settle_ns <= now_ns:
                self._settled[name] = state
                changes.settled.append(name)
        missing = self._last.keys() - seen.keys()
        for name in sorted(missing & self._missing):
            del self._last[name]
            self._settled.pop(name, None)
            changes.removed.append(name)
        self._missing = missing - set(changes.removed)
        self._last.update(seen)
        return changes

    def __contains__(self, name: str) -> bool:
        """Return whether the folder existed in the last scans."""
        return name in self._last

    def recheck_all(self) -> None:
        """Report every folder as settled again at the next scan."""
        self._settled.clear()

    def recheck(self, name: str) -> None:
        """Report a folder as settled again at the next scan."""
        self._settled.pop(name, None)
