"""Who lives, and how much each worker may get."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.wire import messages as m
from scheduler.fairness import TokenCounters
from scheduler.fleet import MAX_LOADS, QUEUED_AHEAD, UNFITTED_STEP, Fleet, Tier
from scheduler.ledger import Ledger
from scheduler.request import Request
from tests.scheduler.fakes import make_submit

TIMEOUT_S = 3.5


def beat(wid: str, sent_ms: int = 1, *, name: str = "", capacity: int = 8, **more: Any) -> m.WorkerBeat:
    return m.WorkerBeat(wid=wid, name=name or wid, capacity=capacity, sent_ms=sent_ms, **more)


def make_fleet(*beats: m.WorkerBeat) -> Fleet:
    fleet = Fleet(TIMEOUT_S)
    fleet.observe({b.wid: b for b in beats}, 0.0)
    return fleet


def make_ledger(fleet: Fleet) -> Ledger:
    return Ledger(fleet, TokenCounters(1e9), lambda digest: 16)


def request(rid: str, digest: str = "", *, epoch: int = 0, attempts: int = 0, **more: Any) -> Request:
    return Request(make_submit(rid, digest=digest, **more), epoch, attempts)


# ---------------------------------------------------------------- liveness


def test_a_silent_worker_is_dead_after_the_timeout_and_not_before() -> None:
    fleet = make_fleet(beat("w"))
    polls = 0
    while not fleet.observe({"w": beat("w")}, 0.5):
        polls += 1
    assert (polls + 1) * 0.5 == TIMEOUT_S


def test_a_beat_that_changes_keeps_a_worker_alive() -> None:
    fleet = make_fleet(beat("w"))
    for sent in range(2, 100):
        assert fleet.observe({"w": beat("w", sent)}, 3.0) == []


def test_an_expired_beat_alone_kills_nobody() -> None:
    """After a restart of the queue every beat has expired; the workers come back within a second."""
    fleet = make_fleet(beat("w"))
    assert fleet.observe({"w": None}, 1.0) == []
    assert fleet.observe({"w": beat("w", 2)}, 1.0) == []
    assert fleet.observe({"w": None}, 3.0) == []
    assert fleet.observe({"w": None}, 1.0) == ["w"]


def test_a_registered_worker_that_is_never_heard_is_dead_after_the_timeout() -> None:
    fleet = make_fleet()
    assert fleet.observe({"old": None}, 60.0) == []  # the first look: nobody has listened before
    assert fleet.observe({"old": None}, 2.0) == []
    assert fleet.observe({"old": None}, 2.0) == ["old"]
    fleet.remove("old")
    assert fleet.observe({}, 60.0) == []


def test_a_worker_off_the_register_is_gone_at_once() -> None:
    assert make_fleet(beat("w1"), beat("w2")).observe({"w2": beat("w2", 2)}, 0.5) == ["w1"]


def test_a_new_process_of_the_same_name_replaces_a_silent_one_early() -> None:
    fleet = make_fleet(beat("old", name="gpu0"))
    both = {"old": beat("old", name="gpu0"), "new": beat("new", name="gpu0")}
    assert fleet.observe(both, 0.5) == []
    assert fleet.observe(both | {"new": beat("new", 2, name="gpu0")}, 0.5) == []
    assert fleet.observe(both | {"new": beat("new", 3, name="gpu0")}, 0.5) == ["old"]


def test_two_living_workers_may_share_a_name() -> None:
    fleet = make_fleet(beat("a", name="same"), beat("b", name="same"))
    for sent in range(2, 20):
        assert fleet.observe({wid: beat(wid, sent, name="same") for wid in ("a", "b")}, 1.0) == []


# ---------------------------------------------------------------- what a worker may get


def test_ready_requests_fill_the_capacity_and_two_wait() -> None:
    fleet = make_fleet(beat("w", capacity=4))
    worker, ledger = fleet.workers["w"], make_ledger(fleet)
    num = 0
    while worker.ready_credit("interactive") > 0:
        ledger.assign(request(f"r{num}"), worker)
        num += 1
    assert num == 4 + QUEUED_AHEAD


def test_batch_work_leaves_room_and_never_queues_ahead() -> None:
    fleet = make_fleet(beat("w", capacity=20))
    assert fleet.workers["w"].ready_credit("batch") == 15


def test_who_gives_way_leaves_an_eighth_also_once_its_adapter_comes() -> None:
    fleet = make_fleet(beat("w", capacity=16))
    worker, ledger = fleet.workers["w"], make_ledger(fleet)
    assert worker.ready_credit("interactive", gives_way=True) == 14
    for i in range(14):
        assert worker.takes_cold("d", "interactive", gives_way=True)
        ledger.assign(request(f"r{i}", "d"), worker)
    assert not worker.takes_cold("d", "interactive", gives_way=True)
    assert worker.takes_cold("d", "interactive")
    assert worker.ready_credit("interactive") == 16 + QUEUED_AHEAD


def test_places_and_memory_of_those_over_their_share_count_as_free_for_others() -> None:
    fleet = make_fleet(beat("w", capacity=16, waiting=1, kv_blocks_total=100, kv_blocks_free=1))
    worker, ledger = fleet.workers["w"], make_ledger(fleet)
    assert worker.ready_credit("interactive") == 0, "there is no memory"
    for i in range(14):
        item = request(f"flood{i}")
        item.over_share = True
        ledger.assign(item, worker)
    assert worker.ready_credit("batch") == worker.ready_credit("interactive", over_share=True) == 0
    assert worker.ready_credit("interactive", over_share=True, gives_way=True) == 0
    assert worker.ready_credit("interactive") == 16 + QUEUED_AHEAD
    ledger.assign(request("quiet"), worker)
    assert worker.ready_credit("interactive") == 15 + QUEUED_AHEAD


def test_those_over_their_share_wait_for_each_other() -> None:
    fleet = make_fleet(beat("w", capacity=16))
    worker, ledger = fleet.workers["w"], make_ledger(fleet)
    for i in range(16):
        item = request(f"flood{i}")
        item.over_share = True
        ledger.assign(item, worker)
    assert worker.ready_credit("interactive", over_share=True) == QUEUED_AHEAD
    assert worker.ready_credit("interactive", over_share=True, gives_way=True) < 0


def test_a_worker_of_one_place_serves_everyone() -> None:
    worker = make_fleet(beat("w", capacity=1)).workers["w"]
    assert worker.ready_credit("batch") == worker.ready_credit("interactive", gives_way=True) == 1
    assert worker.takes_cold("d", "batch")


def test_waiting_for_an_adapter_takes_no_capacity_but_is_bounded() -> None:
    fleet = make_fleet(beat("w", capacity=4))
    worker, ledger = fleet.workers["w"], make_ledger(fleet)
    for i in range(4):
        assert worker.takes_cold("d", "interactive")
        ledger.assign(request(f"r{i}", "d"), worker)
    assert worker.ready_credit("interactive") == 4 + QUEUED_AHEAD
    assert not worker.takes_cold("d", "interactive")
    fleet.observe({"w": beat("w", 2, capacity=4, resident=["d"])}, 1.0)
    ledger.observe(worker)
    assert worker.ready_credit("interactive") == QUEUED_AHEAD
    assert worker.cold == Counter()


def test_only_so_many_adapters_are_on_their_way_to_a_worker() -> None:
    fleet = make_fleet(beat("w", capacity=100))
    worker, ledger = fleet.workers["w"], make_ledger(fleet)
    for i in range(MAX_LOADS):
        assert worker.takes_cold(f"d{i}", "batch") == (i < MAX_LOADS // 2)
        ledger.assign(request(f"r{i}", f"d{i}"), worker)
    assert not worker.takes_cold("more", "interactive")
    assert worker.takes_cold("d0", "interactive")


def test_a_worker_short_of_cache_gets_nothing_until_what_waits_there_runs() -> None:
    full: dict[str, Any] = {"kv_blocks_total": 100, "kv_blocks_free": 5}
    assert make_fleet(beat("w", waiting=1, **full)).workers["w"].ready_credit("interactive") == 0
    assert make_fleet(beat("w", waiting=0, **full)).workers["w"].ready_credit("interactive") > 0
    assert make_fleet(beat("w", waiting=1, waiting_adapter=1, **full)).workers["w"].ready_credit("interactive") > 0


def test_tiers_come_from_the_beat_and_from_what_was_assigned() -> None:
    fleet = make_fleet(beat("w", resident=["r"], loading=["l"], host=["h"]))
    worker = fleet.workers["w"]
    tiers = [worker.tier(digest) for digest in ("", "r", "l", "h", "elsewhere")]
    assert tiers == [Tier.RESIDENT, Tier.RESIDENT, Tier.LOADING, Tier.HOST, Tier.REMOTE]
    make_ledger(fleet).assign(request("x", "elsewhere"), worker)
    assert worker.tier("elsewhere") is Tier.LOADING


def test_step_time_counts_the_rank_of_an_adapter_once() -> None:
    model = m.StepModel(a=0.01, b=0.001, c=1e-6, d=1e-4)
    fleet = make_fleet(beat("w", step_model=model, resident=["d"]))
    worker, ledger = fleet.workers["w"], make_ledger(fleet)
    assert worker.step_s(request("a", "d"), 100, 16) == pytest.approx(0.01 + 0.001 + 1e-4 + 16e-4)
    ledger.assign(request("a", "d", num_prompt_tokens=60, max_new_tokens=40), worker)
    assert worker.step_s(request("b", "d"), 100, 16) == pytest.approx(0.01 + 0.002 + 2e-4 + 16e-4)
    assert worker.step_s(request("b", "e"), 100, 64) == pytest.approx(0.01 + 0.002 + 2e-4 + 80e-4)


def test_a_new_worker_counts_as_fast_as_one_that_has_measured() -> None:
    model = m.StepModel(a=0.001, b=0.0001)
    fleet = make_fleet(beat("w"))
    assert fleet.workers["w"].model == UNFITTED_STEP
    fleet.observe({"w": beat("w", 2), "x": beat("x", step_model=model)}, 1.0)
    fleet.observe({"w": beat("w", 3), "x": beat("x", 2, step_model=model)}, 1.0)
    assert fleet.workers["w"].model == model


def test_draining_and_unreachable_workers_hold_nothing_for_others() -> None:
    fleet = make_fleet(beat("w1", resident=["d"]), beat("w2", resident=["d"]))
    assert fleet.take_moved() == {"d": True}
    fleet.observe({"w1": beat("w1", 2, resident=["d"], draining=True), "w2": beat("w2", 2, resident=["d"])}, 1.0)
    assert fleet.holders == {"d": {"w2"}}
    assert fleet.take_moved() == {}
    fleet.set_unreachable("w2")
    assert fleet.take_moved() == {"d": False}
    assert list(fleet.available()) == []
    fleet.observe({"w1": beat("w1", 2, draining=True), "w2": beat("w2", 3, resident=["d"])}, 1.0)
    assert fleet.holders == {"d": {"w2"}}


class LedgerMachine(RuleBasedStateMachine):
    """Random assignments, progress, ends and beats: the workers' counts are always those of a recount."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = make_fleet(beat("w0"), beat("w1"))
        self.counters = TokenCounters(1e9)
        self.ledger = Ledger(self.fleet, self.counters, lambda digest: 1 + ord(digest))
        self.assigned: dict[str, Request] = {}
        self.lengths: dict[str, int] = {}
        self.paid: Counter[str] = Counter()
        self.count = 0
        self.sent = 1

    @rule(
        wid=st.sampled_from(("w0", "w1")), digest=st.sampled_from(("", "a", "b")), resumed=st.booleans(),
        attempts=st.integers(0, 2), tenant=st.sampled_from(("t0", "t1")), over=st.booleans(),
    )  # fmt: skip
    def assign(self, wid: str, digest: str, resumed: bool, attempts: int, tenant: str, over: bool) -> None:
        self.count += 1
        item = request(f"r{self.count}", digest, epoch=2 * resumed, attempts=attempts * resumed, tenant=tenant)
        item.output_charged, item.over_share = -1 if resumed else 0, over
        self.lengths[item.rid] = 7 if resumed else 0
        self.assigned[item.rid] = item
        self.ledger.assign(item, self.fleet.workers[wid])
        self.paid[tenant] += item.submit.num_prompt_tokens

    @precondition(lambda self: self.assigned)
    @rule(data=st.data(), new=st.integers(0, 3), how=st.sampled_from(("end", "hand back", "remove")))
    def leave(self, data: st.DataObject, new: int, how: str) -> None:
        item = self.assigned.pop(data.draw(st.sampled_from(sorted(self.assigned))))
        length = self.lengths[item.rid] + new
        if how == "remove":
            self.ledger.remove(item)
            self.ledger.remove(item)
            return
        self._pay(item, length)
        (self.ledger.end if how == "end" else self.ledger.hand_back)(item, length)
        assert item.wid == ""

    @rule(data=st.data(), resident=st.sets(st.sampled_from(("a", "b"))))
    def beat(self, data: st.DataObject, resident: set[str]) -> None:
        self.sent += 1
        beats = {}
        for wid, worker in self.fleet.workers.items():
            progress = []
            for rid, item in worker.requests.items():
                self.lengths[rid] += data.draw(st.integers(0, 2))
                self._pay(item, self.lengths[rid])
                progress.append((rid, self.lengths[rid]))
            beats[wid] = beat(wid, self.sent, progress=[*progress, ("unknown", 5)], resident=sorted(resident))
        self.fleet.observe(beats, 1.0)
        for worker in self.fleet.workers.values():
            self.ledger.observe(worker)

    def _pay(self, item: Request, length: int) -> None:
        """A log that was there before this scheduler led is paid for; the rest is paid once."""
        if item.output_charged >= 0:
            self.paid[item.submit.tenant] += 2 * max(0, length - item.output_charged)

    @invariant()
    def counts_are_those_of_a_recount(self) -> None:
        for worker in self.fleet.workers.values():
            items = [item for item in self.assigned.values() if item.wid == worker.wid]
            assert worker.requests == {item.rid: item for item in items}
            assert worker.num_ready == sum(item.ready for item in items)
            assert worker.num_over_share == sum(item.ready and item.over_share for item in items)
            assert worker.cold == Counter(item.submit.digest for item in items if not item.ready)
            assert worker.by_digest == Counter(item.submit.digest for item in items)
            assert worker.num_tokens == sum(item.reserved_tokens for item in items)
            assert worker.rank_sum == sum(1 + ord(d) for d in {item.submit.digest for item in items} - {""})
            assert worker.suspects == Counter(i.attempts for i in items if i.attempts and not i.started)
        for tenant, tokens in self.paid.items():
            assert self.counters[tenant] == tokens


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
