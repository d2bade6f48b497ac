"""Pins and evictions: pinned adapters stay, evicted ones leave once unused, and the fleet learns of both."""

from __future__ import annotations

from helpers.adapter_loading import PAGE_BYTES, Loading, make_adapter

from gpu_worker.adapters.packing.packer import HostAdapter
from gpu_worker.adapters.residency import Residency
from protocol.wire.errors import LorafleetError
from protocol.wire.messages import AdapterEvent


class Ordered(Loading):
    """A cache with pins and evictions, driven in the engine's order: load wanted adapters, then evict."""

    def __init__(self, num_pages: int, adapters: list[HostAdapter]) -> None:
        super().__init__(num_pages, adapters)
        self.residency = Residency(self.cache)
        self.queued: list[str] = []

    def run(self) -> list[AdapterEvent]:
        """Run steps until no adapter is loading any more; return the eviction events."""
        events: list[AdapterEvent] = []
        while True:
            self.changed.clear()
            self.residency.note(self.cache.poll())
            self.residency.note(self.cache.load([*self.queued, *self.residency.wanted()]))
            self.residency.settle(self.queued)
            events += [event for event in self.cache.events.take()[0] if event.kind == "evicted"]
            if not self.cache.loading:
                return events
            assert self.changed.wait(timeout=60)


def test_a_pinned_adapter_comes_and_stays() -> None:
    loading = Ordered(2, [make_adapter(name, 8) for name in "abc"])
    loading.residency.pin("a")
    assert loading.run() == []
    assert loading.cache.resident == ["a"]
    for name in "bcb":
        loading.queued = [name]
        loading.run()
        assert sorted(loading.cache.resident) == ["a", name]
    loading.residency.unpin("a")
    loading.queued = ["b", "c"]
    assert [event.digest for event in loading.run()] == ["a"]
    assert loading.residency.pins == {}


def test_pins_take_at_most_half_of_the_pool() -> None:
    """The adapter over the limit is served unpinned, its pin names the reason, and it is pinned once there is room."""
    loading = Ordered(4, [make_adapter(name, 8) for name in "abcd"] + [make_adapter("wide", 33)])
    for name in "abc":
        loading.residency.pin(name)
    loading.run()
    assert loading.residency.pins["a"] == loading.residency.pins["b"] == ""
    assert "half of the pool" in loading.residency.pins["c"]
    failed = {}
    loading.cache.load(["wide"])
    while not failed:
        loading.changed.wait(timeout=60)
        loading.changed.clear()
        failed = {**loading.cache.poll(), **loading.cache.load(["wide"])}
    assert "pinned adapters leave less" in failed["wide"].message
    assert failed["wide"].retryable
    loading.residency.unpin("a")
    loading.residency.pin("c")
    loading.run()
    assert loading.residency.pins == {"b": "", "c": ""}


def test_a_pin_that_fails_says_why_and_is_tried_when_it_is_ordered_again() -> None:
    loading = Ordered(2, [make_adapter("huge", 100)])
    loading.residency.pin("huge")
    loading.run()
    assert "bytes of the adapter pool" in loading.residency.pins["huge"]
    assert loading.residency.wanted() == []
    loading.residency.pin("huge")
    assert loading.residency.wanted() == ["huge"]


def test_one_that_failed_is_not_tried_by_every_request_but_by_a_new_pin() -> None:
    loading = Ordered(2, [])

    def ask() -> dict[str, LorafleetError]:
        failed = loading.cache.load(["a"])
        while loading.cache.loading:
            assert loading.changed.wait(timeout=60)
            loading.changed.clear()
            failed |= loading.cache.poll()
        return failed

    first, second = ask(), ask()
    assert first["a"] is second["a"]
    assert loading.reads == ["a"]
    loading.known["a"] = make_adapter("a", 8)
    assert ask() == first
    loading.residency.pin("a")
    loading.run()
    assert loading.cache.resident == ["a"]


def test_an_eviction_frees_pool_and_host_and_says_how_much() -> None:
    adapter = make_adapter("a", 8)
    loading = Ordered(2, [adapter, make_adapter("b", 8)])
    loading.queued = ["a"]
    loading.run()
    free_bytes = loading.cache.pool.free_bytes
    loading.residency.evict("a", "order 1")
    assert loading.run() == [], "requests wait for it"
    loading.queued = []
    loading.cache.acquire("a")
    assert loading.run() == [], "a request uses it"
    loading.cache.release("a")
    (told,) = loading.run()
    assert (told.digest, told.order) == ("a", "order 1")
    assert told.pool_bytes == loading.cache.pool.free_bytes - free_bytes == PAGE_BYTES[0]
    assert told.host_bytes == adapter.num_bytes
    assert loading.evicted == ["a"], "its KV blocks are the next to be reused"
    assert not loading.cache.resident
    assert "a" not in loading.cache.host
    loading.residency.evict("b", "order 2")
    (told,) = loading.run()
    assert (told.order, told.pool_bytes, told.host_bytes) == ("order 2", 0, 0), "it was not there"


def test_what_happens_is_told() -> None:
    loading = Ordered(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.queued = ["a"]
    loading.run()
    loading.cache.events.record_use("a", resident=True)
    loading.cache.events.record_use("a", resident=False)
    loading.queued = ["b"]
    loading.load("b", until="b")
    events, uses = loading.cache.events.take()
    assert [(event.kind, event.digest) for event in events] == [("staged", "b"), ("evicted", "a"), ("resident", "b")]
    assert (uses["a"].hits, uses["a"].misses, uses["b"].fetches, uses["b"].loads) == (1, 1, 1, 1)
