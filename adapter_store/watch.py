"""When is an adapter folder whole? Pure: fed with scans, tells what to take in and what is gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapter_store.sources.local import FolderState


@dataclass(slots=True)
class Changes:
    """What one scan brought."""

    appeared: list[str] = field(default_factory=list)  # first seen
    settled: list[str] = field(default_factory=list)  # whole, and new or changed since it last settled
    removed: list[str] = field(default_factory=list)


class Watch:
    """Follows the folders over scans.

    A folder has settled when nothing in it changed between two scans or for `settle_ns` before the first one; it is
    removed when two scans in a row miss it, so that one replaced by another under the same name stays.
    """

    def __init__(self, settle_ns: int, known: Iterable[str] = ()) -> None:
        """`known` are names that were there before: they are reported as removed if no scan finds them."""
        self._settle_ns = settle_ns
        self._last = {name: FolderState() for name in known}
        self._settled: dict[str, FolderState] = {}
        self._missing: set[str] = set()

    def observe(self, seen: Mapping[str, FolderState], now_ns: int) -> Changes:
        """Take a scan made at unix time `now_ns`."""
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
        return name in self._last

    def all_again(self) -> None:
        """Report every folder as settled once more."""
        self._settled.clear()

    def again(self, name: str) -> None:
        """Report a folder as settled once more: taking it in failed for a reason that may pass."""
        self._settled.pop(name, None)
