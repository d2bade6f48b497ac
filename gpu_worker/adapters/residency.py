"""Pins and evictions that the fleet orders from one worker. Runs in the engine's thread, between steps."""

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
        self._pins: dict[str, str] = {}  # digest -> why it is not in the pool; "" if it is resident or loading
        self._leaving: dict[str, list[str]] = {}  # digest -> ids of the orders to evict it

    @property
    def pins(self) -> dict[str, str]:
        """The pinned adapters, each with the reason why it cannot stay in the pool; "" if it is resident or loading."""
        return dict(self._pins)

    def pin(self, digest: str) -> None:
        """Load an adapter into the pool and keep it there; retries after a failure."""
        self._pins[digest] = ""
        self._leaving.pop(digest, None)
        self._cache.set_pinned(digest, True)

    def unpin(self, digest: str) -> None:
        """Allow the eviction of an adapter again."""
        self._pins.pop(digest, None)
        self._cache.set_pinned(digest, False)

    def evict(self, digest: str, order: str) -> None:
        """Remove an adapter from pool and host as soon as no request uses it or waits for it.

        order: an id that the eviction's event carries.
        """
        if digest in self._pins:
            self.unpin(digest)
        self._leaving.setdefault(digest, []).append(order)

    def wanted(self) -> list[str]:
        """Return the pinned adapters that should be loaded."""
        return [digest for digest, problem in self._pins.items() if not problem]

    def figures(self, waiting: Sequence[str]) -> dict[str, Any]:
        """Return a heartbeat's fields about adapters. waiting: the adapters of the waiting requests."""
        cache, resident = self._cache, set(self._cache.resident)
        return {
            "waiting_adapter": sum(digest not in resident for digest in waiting),
            "pool_bytes_free": cache.pool.free_bytes, "pool_bytes_total": cache.pool.total_bytes,
            "resident": list(resident), "loading": cache.loading, "host": list(cache.host), "pinned": self.pins,
            "num_loads": cache.num_loads, "num_fetches": cache.num_fetches, "load_seconds": cache.load_times.copy(),
            "host_bytes_used": cache.host.num_bytes, "host_bytes_total": cache.host.max_bytes,
        }  # fmt: skip

    def note(self, failed: Mapping[str, LorafleetError]) -> None:
        """Record why pinned adapters cannot be loaded. They are retried when they are pinned again."""
        for digest in self._pins.keys() & failed.keys():
            self._pins[digest] = failed[digest].message

    def settle(self, queued: Container[str]) -> None:
        """Carry out the evictions that are possible now. queued: adapters that this worker's waiting requests need."""
        residents = self._cache.pool.residents
        for digest, problem in self._pins.items():
            if not problem and digest in residents and not residents[digest].pinned:
                self._pins[digest] = "pinning it would let pinned adapters take more than half of the pool"
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
