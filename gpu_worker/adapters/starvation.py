"""Adapters that find no room in the pool, and the adapters that must make room for them in the end."""

from __future__ import annotations

from collections.abc import Callable, Set

MAX_STARVED_LOADS = 64
"""Times an adapter may find no room before the adapters in its way get no new requests until it has been loaded."""


class Starvation:
    """Counts how often adapters find no room, and stops new requests for those in the way of one that starves.

    One adapter at a time is helped: adapters in the way of several would be all of the pool.
    """

    def __init__(self) -> None:
        self._num_failed: dict[str, int] = {}  # digest -> loads that found no room
        self._draining: set[str] = set()

    def is_draining(self, digest: str) -> bool:
        """Return whether an adapter stands in the way of a starving one and gets no new requests."""
        return digest in self._draining

    def note(self, digest: str, blockers: Callable[[], list[str]]) -> None:
        """Count that an adapter found no room. blockers: returns the adapters in use that are in its way."""
        self._num_failed[digest] = self._num_failed.get(digest, 0) + 1
        if self._num_failed[digest] > MAX_STARVED_LOADS and not self._draining:
            self._draining = set(blockers())

    def end(self, digest: str) -> None:
        """Forget an adapter: it has found room, or nobody wants it."""
        if self._num_failed.pop(digest, None) is not None and not self._num_failed:
            self._draining = set()

    def keep(self, wanted: Set[str]) -> None:
        """Forget the adapters that are not wanted."""
        for digest in self._num_failed.keys() - wanted:
            self.end(digest)
