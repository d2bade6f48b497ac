"""The adapter pool's bookkeeping: no page or slot is lost or shared, and no adapter in use is evicted."""

from __future__ import annotations

import pytest
from helpers import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_worker.adapters.pool import PagePool, Resident

CAPACITY = (6, 5, 1)
DIGESTS = [f"d{i}" for i in range(8)]
PAGES = st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(0, 1))


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(CAPACITY, (100, 300, 1000), num_slots=4)
        self.ever_used: list[set[int]] = [set() for _ in CAPACITY]

    def _pages_of(self, before: dict[str, Resident], digests: set[str]) -> list[int]:
        """Return per group how many pages these adapters had."""
        return [sum(len(before[digest].pages[group]) for digest in digests) for group in range(len(CAPACITY))]

    def _pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.pool.residents)))

    @rule(digest=st.sampled_from(DIGESTS), num_pages=PAGES, keep=st.sets(st.sampled_from(DIGESTS), max_size=3))
    def reserve(self, digest: str, num_pages: tuple[int, ...], keep: set[str]) -> None:
        if digest in self.pool.residents:
            return
        before = dict(self.pool.residents)
        movable = [r for r in before.values() if r.visible and not r.refs and not r.pinned and r.digest not in keep]
        staying = [r for r in before.values() if r not in movable]
        room = [n - sum(len(r.pages[g]) for r in staying) for g, n in enumerate(CAPACITY)]
        possible = all(n <= have for n, have in zip(num_pages, room, strict=True)) and len(staying) < 4
        evicted = self.pool.reserve(digest, num_pages, keep)
        assert (evicted is not None) == possible
        if evicted is None:
            assert self.pool.residents == before
            return
        assert {before[d].digest for d in evicted} <= {r.digest for r in movable}
        assert evicted == {d: before[d].num_bytes for d in evicted}
        queued = {d for d in evicted if d in self.pool.queued}
        for r in movable if queued else ():
            # A queued adapter is evicted only if the unqueued ones that stay have no pages in its groups.
            spared = r.digest not in evicted and r.digest not in self.pool.queued
            assert not spared or all(
                not (lost and have) for lost, have in zip(self._pages_of(before, queued), r.pages, strict=True)
            )
        assert [len(pages) for pages in self.pool.residents[digest].pages] == list(num_pages)
        for ever, pages in zip(self.ever_used, self.pool.residents[digest].pages, strict=True):
            ever.update(pages)
        assert self.pool.acquire(digest) is None, "it must not be seen before its weights have arrived"

    @precondition(lambda self: self.pool.residents)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self.pool.publish(self._pick(data))

    @rule(digest=st.sampled_from(DIGESTS))
    def acquire(self, digest: str) -> None:
        slot = self.pool.acquire(digest)
        resident = self.pool.residents.get(digest)
        assert (slot is not None) == (resident is not None and resident.visible)

    @precondition(lambda self: any(r.refs for r in self.pool.residents.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        used = sorted(r.digest for r in self.pool.residents.values() if r.refs)
        self.pool.release(data.draw(st.sampled_from(used)))

    @precondition(lambda self: self.pool.residents)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        self.pool.residents[self._pick(data)].pinned = pinned

    @rule(digest=st.sampled_from(DIGESTS), pinned=st.booleans())
    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Pin or unpin an adapter, resident or not; the pin holds only while others keep half of the pool."""
        others = [r for r in self.pool.residents.values() if r.pinned and r.digest != digest]
        self.pool.set_pinned(digest, pinned)
        assert (digest in self.pool.pins) == pinned
        if resident := self.pool.residents.get(digest):
            held = [*others, resident]
            pages = [sum(len(r.pages[g]) for r in held) for g in range(len(CAPACITY))]
            fits = 2 * len(held) <= 4 and all(
                2 * num <= have or not own
                for num, have, own in zip(pages, CAPACITY, map(len, resident.pages), strict=True)
            )
            assert resident.pinned == (pinned and fits)

    @rule(queued=st.frozensets(st.sampled_from(DIGESTS), max_size=4))
    def set_queued(self, queued: frozenset[str]) -> None:
        self.pool.queued = queued

    @precondition(lambda self: self.pool.residents)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        digest = self._pick(data)
        if self.pool.residents[digest].refs:
            with pytest.raises(ValueError, match="in use"):
                self.pool.remove(digest)
        else:
            self.pool.remove(digest)

    @invariant()
    def pages_ever_used_are_the_first(self) -> None:
        assert self.ever_used == [set(range(num)) for num in self.pool.num_ever_used]

    @invariant()
    def consistent(self) -> None:
        self.pool.check_integrity()
        used = sum(resident.num_bytes for resident in self.pool.residents.values())
        assert self.pool.free_bytes + used == self.pool.total_bytes


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=examples.of(60), stateful_step_count=40, deadline=None)


def load(pool: PagePool, digest: str, num_pages: tuple[int, ...], uses: int = 0) -> list[str] | None:
    evicted = pool.reserve(digest, num_pages)
    if evicted is not None:
        pool.publish(digest)
    for _ in range(uses):
        pool.acquire(digest)
        pool.release(digest)
    return None if evicted is None else list(evicted)


def test_the_often_used_one_stays() -> None:
    pool = PagePool((2,), (100,), num_slots=8)
    load(pool, "often", (1,), uses=5)
    load(pool, "once", (1,), uses=1)
    assert load(pool, "new", (1,)) == ["once"]


def test_the_one_that_is_slow_to_reload_stays() -> None:
    pool = PagePool((2,), (100,), num_slots=8, cost=lambda digest: 1.0 if digest == "far" else 0.01)
    load(pool, "far", (1,), uses=1)
    load(pool, "near", (1,), uses=3)
    assert load(pool, "new", (1,)) == ["near"]


def test_those_waited_for_leave_last() -> None:
    pool = PagePool((3,), (100,), num_slots=8)
    load(pool, "often", (1,), uses=5)
    load(pool, "waited for", (1,), uses=1)
    load(pool, "seldom", (1,), uses=2)
    pool.queued = frozenset({"waited for"})
    assert load(pool, "a", (1,)) == ["seldom"]
    assert load(pool, "b", (2,)) == ["a", "often"]
    assert load(pool, "c", (3,)) == ["b", "waited for"]


def test_old_fame_fades() -> None:
    pool = PagePool((2,), (100,), num_slots=8)
    load(pool, "famous", (1,), uses=4)
    evicted = [load(pool, f"d{i}", (1,), uses=1) for i in range(12)]
    assert ["famous"] in evicted


def test_an_attention_adapter_does_not_push_out_an_mlp_adapter() -> None:
    pool = PagePool((1, 1), (100, 300), num_slots=8)
    load(pool, "mlp", (0, 1), uses=1)
    load(pool, "attention", (1, 0), uses=9)
    assert load(pool, "new", (1, 0)) == ["attention"]


def test_what_a_loader_still_writes_to_is_nobody_elses() -> None:
    pool = PagePool((1,), (100,), num_slots=8)
    assert pool.reserve("loading", (1,)) == {}
    assert pool.reserve("next", (1,)) is None
    assert pool.blockers((1,)) == []
    pool.publish("loading")
    assert pool.reserve("next", (1,)) == {"loading": 100}


def test_blockers_are_those_in_use_that_stand_in_the_way() -> None:
    pool = PagePool((3,), (100,), num_slots=8)
    load(pool, "busy", (2,))
    load(pool, "idle", (1,))
    pool.acquire("busy")
    assert pool.reserve("large", (3,)) is None
    assert pool.blockers((3,)) == ["busy"]
    pool.release("busy")
    assert set(pool.reserve("large", (3,)) or []) == {"busy", "idle"}


def test_what_can_never_fit_is_known_at_once() -> None:
    pool = PagePool((3, 1), (100, 100), num_slots=8)
    assert pool.can_ever_hold((3, 1))
    assert not pool.can_ever_hold((4, 0))
