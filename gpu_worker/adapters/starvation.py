"""Adapters that do not fit into the pool, and the adapters in use that must be drained for them."""

from __future__ import annotations

from collections.abc import Callable, Set

MAX_STARVED_LOADS = 64
"""Failed attempts to find space, after which the adapters in the way get no new requests until this one is loaded."""


class Starvation:
    """Counts failed attempts to find space, and stops new requests for the adapters that block a starved one.

    Only one adapter is helped at a time: the blockers of several could be the whole pool.
    """

    def __init__(self) -> None:
        self._num_failed: dict[str, int] = {}  # digest -> loads that found no space
        self._draining: set[str] = set()

    def is_draining(self, digest: str) -> bool:
        """Return whether an adapter blocks a starved one and gets no new requests."""
        return digest in self._draining

    def note(self, digest: str, blockers: Callable[[], list[str]]) -> None:
        """Count a failed attempt to find space. blockers: returns the adapters in use that are in the way."""
        self._num_failed[digest] = self._num_failed.get(digest, 0) + 1
        if self._num_failed[digest] > MAX_STARVED_LOADS and not self._draining:
            self._draining = set(blockers())

    def end(self, digest: str) -> None:
        """Forget an adapter: it found space, or is no longer wanted."""
        if self._num_failed.pop(digest, None) is not None and not self._num_failed:
            self._draining = set()

    def keep(self, wanted: Set[str]) -> None:
        """Forget the adapters that are not wanted."""
        for digest in self._num_failed.keys() - wanted:
            self.end(digest)
