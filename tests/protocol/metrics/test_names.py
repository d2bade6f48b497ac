"""Names in labels are bounded: whatever is requested by any client, the number of series is limited."""

from __future__ import annotations

from helpers.clocks import SetClock
from prometheus_client import CollectorRegistry, Counter, Histogram

from protocol.metrics.names import CANDIDATES, OTHER, RANK_S, TopNames


def series_of(registry: CollectorRegistry) -> set[tuple[str, ...]]:
    return {(s.name, *s.labels.values()) for metric in registry.collect() for s in metric.samples}


def make(limit: int, clock: SetClock) -> tuple[TopNames, Counter, CollectorRegistry]:
    registry = CollectorRegistry()
    counter = Counter("uses_total", "Uses.", ["adapter"], registry=registry)
    names = TopNames("adapter", counter, now_s=clock)
    names.set_limit(limit)
    return names, counter, registry


def test_ten_thousand_names_have_no_more_series_than_the_limit() -> None:
    registry = CollectorRegistry()
    counter = Counter("tokens_total", "Tokens.", ["adapter", "kind"], registry=registry)
    spread = Histogram("seconds", "Seconds.", ["adapter"], buckets=(1, 2), registry=registry)
    clock = SetClock()
    names = TopNames("adapter", counter, spread, now_s=clock)
    names.set_limit(100)
    for turn in range(30):
        for i in range(10_000):
            name = names.of(f"adapter-{(i * 7919 + turn) % 10_000}")
            counter.labels(name, "output").inc()
            spread.labels(name).observe(1)
        clock.now_s += RANK_S / 4
        assert len({labels[1] for labels in series_of(registry)}) <= 101
        assert len(names._uses) <= CANDIDATES * 100
    total = sum(s.value for m in registry.collect() for s in m.samples if s.name == "seconds_count")
    assert total <= 300_000  # evicted names lost their counts; nothing was counted twice


def test_places_go_to_the_most_used() -> None:
    clock = SetClock()
    names, counter, registry = make(2, clock)
    for name in ("first", "second"):
        counter.labels(names.of(name)).inc()
    for _ in range(50):
        assert names.of("third") == OTHER
    clock.now_s += RANK_S
    assert names.of("third") == "third"
    kept = {names.of(name) for name in ("first", "second")}
    assert OTHER in kept
    assert len(kept) == 2
    assert len(series_of(registry)) == 1  # the series of a name that lost its place is gone


def test_who_is_used_as_often_keeps_its_place() -> None:
    clock = SetClock()
    names, _, _ = make(1, clock)
    for _ in range(5):
        assert names.of("mine") == "mine"
        assert names.of("yours") == OTHER
        clock.now_s += RANK_S


def test_unused_names_keep_places_that_nobody_needs() -> None:
    clock = SetClock()
    names, counter, registry = make(10, clock)
    counter.labels(names.of("rare")).inc()
    for _ in range(20):
        clock.now_s += RANK_S
        names.of("busy")
    assert names.of("rare") == "rare"
    assert ("uses_total", "rare") in series_of(registry)


def test_without_a_limit_there_is_no_name() -> None:
    names, _, _ = make(0, SetClock())
    assert {names.of(f"name-{i}") for i in range(100)} == {OTHER}


def test_a_name_that_is_the_rest_s_takes_no_place() -> None:
    names, _, _ = make(2, SetClock())
    assert names.of(OTHER) == OTHER
    assert {names.of("a"), names.of("b")} == {"a", "b"}
