"""What the fleet has ordered of one worker's adapters: which stay in the pool, which go as soon as nobody uses them.

Runs in the engine's thread, between steps.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from gpu_worker.adapters.cache import AdapterCache
from protocol.wire.errors import LorafleetError
from protocol.wire.messages import AdapterEvent


class Residency:
    """Pins and evictions of one adapter cache."""

    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache
        self._pins: dict[str, str] = {}  # digest -> why it is not in the pool
        self._leaving: dict[str, list[str]] = {}  # digest -> orders that want to hear of it

    @property
    def pins(self) -> dict[str, str]:
        """Adapters that are to stay, and why one of them cannot be in the pool, "" if it is there or comes."""
        return dict(self._pins)

    def pin(self, digest: str) -> None:
        """Bring an adapter into the pool and keep it; after a failure, try again."""
        self._pins[digest] = ""
        self._leaving.pop(digest, None)
        self._cache.set_pinned(digest, True)

    def unpin(self, digest: str) -> None:
        """Let an adapter leave like any other."""
        self._pins.pop(digest, None)
        self._cache.set_pinned(digest, False)

    def evict(self, digest: str, order: str) -> None:
        """Send an adapter away from the pool and the host as soon as no request uses it or waits for it."""
        if digest in self._pins:
            self.unpin(digest)
        self._leaving.setdefault(digest, []).append(order)

    def wanted(self) -> list[str]:
        """Return the pinned adapters that should be loaded."""
        return [digest for digest, problem in self._pins.items() if not problem]

    def figures(self, waiting: Sequence[str]) -> dict[str, Any]:
        """Return the fields of `EngineStats` that tell of adapters; `waiting`: those of the requests that wait."""
        cache, resident = self._cache, set(self._cache.resident)
        return {
            "waiting_adapter": sum(digest not in resident for digest in waiting),
            "pool_bytes_free": cache.pool.free_bytes, "pool_bytes_total": cache.pool.total_bytes,
            "resident": list(resident), "loading": cache.loading, "host": list(cache.host), "pinned": self.pins,
            "num_loads": cache.num_loads, "num_fetches": cache.num_fetches,
        }  # fmt: skip

    def note(self, failed: Mapping[str, LorafleetError]) -> None:
        """Remember why pinned adapters cannot be loaded; they are tried again when they are ordered again."""
        for digest in self._pins.keys() & failed.keys():
            self._pins[digest] = failed[digest].message

    def settle(self, queued: Container[str]) -> None:
        """Send away what may go; `queued` are the adapters that this worker's waiting requests need."""
        residents = self._cache.pool.residents
        for digest, problem in self._pins.items():
            if not problem and digest in residents and not residents[digest].pinned:
                self._pins[digest] = "pinned adapters would take more than half of the pool with it"
        for digest in [digest for digest in self._leaving if digest not in queued]:
            freed = self._cache.drop(digest)
            if freed is None:
                continue
            pool_bytes, host_bytes = freed
            for order in self._leaving.pop(digest):
                self._cache.events.record(
                    AdapterEvent(
                        kind="evicted", digest=digest, order=order, pool_bytes=pool_bytes, host_bytes=host_bytes
                    )
                )
