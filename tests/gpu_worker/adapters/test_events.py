"""The adapter events that a worker sends to the fleet."""

from __future__ import annotations

from gpu_worker.adapters.events import AdapterEvents
from protocol.wire.messages import AdapterEvent


def test_the_use_of_adapters_is_told_and_that_of_merges_is_not() -> None:
    events = AdapterEvents()
    for digest in ("d1", "merge-x"):
        events.record_use(digest, resident=digest == "d1")
        events.record(AdapterEvent(kind="staged", digest=digest, ms=3.0))
    told, uses = events.take()
    assert [event.digest for event in told] == ["d1", "merge-x"]
    assert list(uses) == ["d1"]
    assert (uses["d1"].hits, uses["d1"].misses, uses["d1"].fetches, uses["d1"].fetch_ms) == (1, 0, 1, 3)
    assert events.take() == ([], {})
