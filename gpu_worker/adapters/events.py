"""Adapter events and uses: recorded by the engine's thread, taken by the service for the fleet."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from peft_adapters.recipe import PREFIX
from protocol.wire.clock import now_ms
from protocol.wire.messages import LOAD_BUCKETS_S, AdapterEvent
from protocol.wire.records import AdapterUse

MAX_KEPT = 10_000
"""Maximum events, and maximum uses, that wait for the service; the oldest are dropped."""


class LoadTimes:
    """Histograms of adapter load times by source tier, in the form of `messages.WorkerBeat.load_seconds`."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}

    def note(self, tier: str, seconds: float) -> None:
        """Count a load from a tier that took some seconds."""
        times = self._times.setdefault(tier, [0.0] * (len(LOAD_BUCKETS_S) + 2))
        times[bisect_left(LOAD_BUCKETS_S, seconds)] += 1
        times[-1] += seconds

    def copy(self) -> dict[str, list[float]]:
        """Return the counts so far."""
        return {tier: list(times) for tier, times in self._times.items()}


class AdapterEvents:
    """Events and uses of adapters. One thread records and one takes: appends and pops of a deque need no lock."""

    def __init__(self) -> None:
        self._events: deque[AdapterEvent] = deque(maxlen=MAX_KEPT)
        self._uses: deque[tuple[str, bool]] = deque(maxlen=MAX_KEPT)

    def record(self, event: AdapterEvent) -> None:
        """Record an adapter event."""
        self._events.append(event)

    def record_use(self, digest: str, *, resident: bool) -> None:
        """Record a request for an adapter, and whether the adapter was in the pool."""
        self._uses.append((digest, resident))

    def take(self) -> tuple[list[AdapterEvent], dict[str, AdapterUse]]:
        """Return the records since the last call: the events, and the use of each adapter by digest.

        Uses of merges are left out: there may be any number, and they have no name under which an operator could look
        them up.
        """
        events = [self._events.popleft() for _ in range(len(self._events))]
        uses: dict[str, AdapterUse] = {}
        for _ in range(len(self._uses)):
            digest, resident = self._uses.popleft()
            use = uses.setdefault(digest, AdapterUse())
            use.hits += resident
            use.misses += not resident
            use.last_ms = now_ms()
        for event in events:
            if event.kind == "staged":
                use = uses.setdefault(event.digest, AdapterUse())
                use.fetches, use.fetch_ms = use.fetches + 1, use.fetch_ms + round(event.ms)
            elif event.kind == "resident":
                use = uses.setdefault(event.digest, AdapterUse())
                use.loads, use.load_ms = use.loads + 1, use.load_ms + round(event.ms)
        return events, {digest: use for digest, use in uses.items() if not digest.startswith(PREFIX)}
