"""Which workers are alive, and how much work each may get."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from helpers import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.wire import messages as m
from scheduler.fairness import VirtualTokenCounters
from scheduler.ledger import Ledger
from scheduler.request import QueuedRequest
from scheduler.workers import MAX_LOADS, QUEUED_AHEAD, UNFITTED_STEP, Tier, Workers
from tests.scheduler.fakes import make_submit

TIMEOUT_S = 3.5


def beat(wid: str, sent_ms: int = 1, *, name: str = "", capacity: int = 8, **more: Any) -> m.WorkerBeat:
    return m.WorkerBeat(wid=wid, name=name or wid, capacity=capacity, sent_ms=sent_ms, **more)


def make_workers(*beats: m.WorkerBeat) -> Workers:
    workers = Workers(TIMEOUT_S)
    workers.observe({b.wid: b for b in beats}, 0.0)
    return workers


def make_ledger(workers: Workers) -> Ledger:
    return Ledger(workers, VirtualTokenCounters(1e9), lambda digest: 16)


def request(rid: str, digest: str = "", *, epoch: int = 0, attempts: int = 0, **more: Any) -> QueuedRequest:
    return QueuedRequest(make_submit(rid, digest=digest, **more), epoch, attempts)


def yielding(rid: str, digest: str = "") -> QueuedRequest:
    item = request(rid, digest)
    item.yields = True
    return item


# ---------------------------------------------------------------- liveness


def test_a_silent_worker_is_dead_after_the_timeout_and_not_before() -> None:
    workers = make_workers(beat("w"))
    polls = 0
    while not workers.observe({"w": beat("w")}, 0.5):
        polls += 1
    assert (polls + 1) * 0.5 == TIMEOUT_S


def test_a_beat_that_changes_keeps_a_worker_alive() -> None:
    workers = make_workers(beat("w"))
    for sent in range(2, 100):
        assert workers.observe({"w": beat("w", sent)}, 3.0) == []


def test_an_expired_beat_alone_kills_nobody() -> None:
    """After a restart of the queue every heartbeat has expired; the workers return within a second."""
    workers = make_workers(beat("w"))
    assert workers.observe({"w": None}, 1.0) == []
    assert workers.observe({"w": beat("w", 2)}, 1.0) == []
    assert workers.observe({"w": None}, 3.0) == []
    assert workers.observe({"w": None}, 1.0) == ["w"]


def test_a_registered_worker_never_heard_is_dead_after_the_timeout() -> None:
    workers = make_workers()
    assert workers.observe({"old": None}, 60.0) == []  # the first observation: nothing was observed before
    assert workers.observe({"old": None}, 2.0) == []
    assert workers.observe({"old": None}, 2.0) == ["old"]
    workers.remove("old")
    assert workers.observe({}, 60.0) == []


def test_a_worker_off_the_register_is_gone_at_once() -> None:
    assert make_workers(beat("w1"), beat("w2")).observe({"w2": beat("w2", 2)}, 0.5) == ["w1"]


def test_a_new_process_of_the_same_name_replaces_a_silent_one_early() -> None:
    workers = make_workers(beat("old", name="gpu0"))
    both = {"old": beat("old", name="gpu0"), "new": beat("new", name="gpu0")}
    assert workers.observe(both, 0.5) == []
    assert workers.observe(both | {"new": beat("new", 2, name="gpu0")}, 0.5) == []
    assert workers.observe(both | {"new": beat("new", 3, name="gpu0")}, 0.5) == ["old"]


def test_two_living_workers_may_share_a_name() -> None:
    workers = make_workers(beat("a", name="same"), beat("b", name="same"))
    for sent in range(2, 20):
        assert workers.observe({wid: beat(wid, sent, name="same") for wid in ("a", "b")}, 1.0) == []


# ---------------------------------------------------------------- capacity


def test_ready_requests_fill_the_capacity_and_two_wait() -> None:
    workers = make_workers(beat("w", capacity=4))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    num = 0
    while worker.ready_credit("interactive") > 0:
        ledger.assign(request(f"r{num}"), worker)
        num += 1
    assert num == 4 + QUEUED_AHEAD


def test_batch_work_leaves_room_and_never_queues_ahead() -> None:
    workers = make_workers(beat("w", capacity=20))
    assert workers.by_id["w"].ready_credit("batch") == 15


def test_yielding_requests_leave_an_eighth_of_the_places_to_others() -> None:
    """Including those that wait for their adapter."""
    workers = make_workers(beat("w", capacity=16))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    ledger.assign(request("other"), worker)
    assert worker.ready_credit("interactive", yields=True) == 13
    for i in range(13):
        assert worker.takes_cold("d", "interactive", yields=True)
        ledger.assign(yielding(f"r{i}", "d"), worker)
    assert not worker.takes_cold("d", "interactive", yields=True)
    assert worker.takes_cold("d", "interactive")
    assert worker.ready_credit("interactive") == 15 + QUEUED_AHEAD


def test_yielding_requests_leave_half_of_the_loads_to_others() -> None:
    workers = make_workers(beat("w", capacity=64))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    for i in range(MAX_LOADS // 2):
        ledger.assign(yielding(f"r{i}", f"d{i}"), worker)
    assert worker.takes_cold("more", "interactive", yields=True), "there are no others"
    ledger.assign(request("other"), worker)
    assert not worker.takes_cold("more", "interactive", yields=True)
    assert worker.takes_cold("more", "interactive")


def test_places_and_memory_of_yielding_requests_count_as_free_for_others() -> None:
    workers = make_workers(beat("w", capacity=16, waiting=1, kv_blocks_total=100, kv_blocks_free=1))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    assert worker.ready_credit("interactive") == 0, "there is no memory"
    for i in range(14):
        ledger.assign(yielding(f"flood{i}"), worker)
    assert worker.ready_credit("batch") == worker.ready_credit("interactive", yields=True) == 0
    assert worker.ready_credit("interactive") == 16 + QUEUED_AHEAD
    ledger.assign(request("quiet"), worker)
    assert worker.ready_credit("interactive") == 15 + QUEUED_AHEAD


def test_yielding_requests_wait_for_each_other() -> None:
    workers = make_workers(beat("w", capacity=16))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    for i in range(16):
        ledger.assign(yielding(f"flood{i}"), worker)
    assert worker.ready_credit("interactive", yields=True) == QUEUED_AHEAD
    ledger.assign(request("other"), worker)
    assert worker.ready_credit("interactive", yields=True) < 0


def test_places_of_batch_work_count_as_free_for_all_others() -> None:
    """Including tenants that yield because they are alone."""
    workers = make_workers(beat("w", capacity=16))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    for i in range(12):
        line = request(f"line{i}", cls="batch")
        line.yields = True
        ledger.assign(line, worker)
    assert worker.ready_credit("batch") == 0
    for yields in (False, True):
        assert worker.ready_credit("interactive", yields=yields) == 16 + QUEUED_AHEAD


def test_a_worker_of_one_place_serves_everyone() -> None:
    worker = make_workers(beat("w", capacity=1)).by_id["w"]
    assert worker.ready_credit("batch") == 1
    assert worker.ready_credit("interactive", yields=True) == 1 + QUEUED_AHEAD
    assert worker.takes_cold("d", "batch")


def test_waiting_for_an_adapter_takes_no_capacity_but_is_bounded() -> None:
    workers = make_workers(beat("w", capacity=4))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    for i in range(4):
        assert worker.takes_cold("d", "interactive")
        ledger.assign(request(f"r{i}", "d"), worker)
    assert worker.ready_credit("interactive") == 4 + QUEUED_AHEAD
    assert not worker.takes_cold("d", "interactive")
    workers.observe({"w": beat("w", 2, capacity=4, resident=["d"])}, 1.0)
    ledger.observe(worker)
    assert worker.ready_credit("interactive") == QUEUED_AHEAD
    assert worker.cold == Counter()


def test_only_so_many_adapters_are_on_their_way_to_a_worker() -> None:
    workers = make_workers(beat("w", capacity=100))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    for i in range(MAX_LOADS):
        assert worker.takes_cold(f"d{i}", "batch") == (i < MAX_LOADS // 2)
        ledger.assign(request(f"r{i}", f"d{i}"), worker)
    assert not worker.takes_cold("more", "interactive")
    assert worker.takes_cold("d0", "interactive")


def test_a_worker_short_of_blocks_gets_nothing_while_requests_wait() -> None:
    full: dict[str, Any] = {"kv_blocks_total": 100, "kv_blocks_free": 5}
    assert make_workers(beat("w", waiting=1, **full)).by_id["w"].ready_credit("interactive") == 0
    assert make_workers(beat("w", waiting=0, **full)).by_id["w"].ready_credit("interactive") > 0
    assert make_workers(beat("w", waiting=1, waiting_adapter=1, **full)).by_id["w"].ready_credit("interactive") > 0


def test_tiers_come_from_the_beat_and_from_what_was_assigned() -> None:
    workers = make_workers(beat("w", resident=["r"], loading=["l"], host=["h"]))
    worker = workers.by_id["w"]
    tiers = [worker.tier(digest) for digest in ("", "r", "l", "h", "elsewhere")]
    assert tiers == [Tier.RESIDENT, Tier.RESIDENT, Tier.LOADING, Tier.HOST, Tier.REMOTE]
    make_ledger(workers).assign(request("x", "elsewhere"), worker)
    assert worker.tier("elsewhere") is Tier.LOADING


def test_step_time_counts_the_rank_of_an_adapter_once() -> None:
    model = m.StepModel(a=0.01, b=0.001, c=1e-6, d=1e-4)
    workers = make_workers(beat("w", step_model=model, resident=["d"]))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    assert worker.step_s(request("a", "d"), 100, 16) == pytest.approx(0.01 + 0.001 + 1e-4 + 16e-4)
    ledger.assign(request("a", "d", num_prompt_tokens=60, max_new_tokens=40), worker)
    assert worker.step_s(request("b", "d"), 100, 16) == pytest.approx(0.01 + 0.002 + 2e-4 + 16e-4)
    assert worker.step_s(request("b", "e"), 100, 64) == pytest.approx(0.01 + 0.002 + 2e-4 + 80e-4)


def test_step_time_counts_a_pass_for_each_request_that_runs_alone() -> None:
    workers = make_workers(beat("w", step_model=m.StepModel(a=0.001, e=0.01)))
    worker, ledger = workers.by_id["w"], make_ledger(workers)
    ledger.assign(request("a", ""), worker)
    assert worker.step_s(request("b", ""), 100, 0) == pytest.approx(0.001 + 0.02)


def test_a_new_worker_counts_as_fast_as_one_that_has_measured() -> None:
    model = m.StepModel(a=0.001, b=0.0001)
    workers = make_workers(beat("w"))
    assert workers.by_id["w"].model == UNFITTED_STEP
    workers.observe({"w": beat("w", 2), "x": beat("x", step_model=model)}, 1.0)
    workers.observe({"w": beat("w", 3), "x": beat("x", 2, step_model=model)}, 1.0)
    assert workers.by_id["w"].model == model


def test_draining_and_unreachable_workers_hold_nothing_for_others() -> None:
    workers = make_workers(beat("w1", resident=["d"]), beat("w2", resident=["d"]))
    assert workers.take_moved() == {"d": True}
    workers.observe({"w1": beat("w1", 2, resident=["d"], draining=True), "w2": beat("w2", 2, resident=["d"])}, 1.0)
    assert workers.holders == {"d": {"w2"}}
    assert workers.take_moved() == {}
    workers.set_unreachable("w2")
    assert workers.take_moved() == {"d": False}
    assert list(workers.available()) == []
    workers.observe({"w1": beat("w1", 2, draining=True), "w2": beat("w2", 3, resident=["d"])}, 1.0)
    assert workers.holders == {"d": {"w2"}}


class LedgerMachine(RuleBasedStateMachine):
    """Random assignments, progress, ends and heartbeats: the workers' counts always equal a recount."""

    def __init__(self) -> None:
        super().__init__()
        self.workers = make_workers(beat("w0"), beat("w1"))
        self.counters = VirtualTokenCounters(1e9)
        self.ledger = Ledger(self.workers, self.counters, lambda digest: 1 + ord(digest))
        self.assigned: dict[str, QueuedRequest] = {}
        self.lengths: dict[str, int] = {}
        self.paid: Counter[str] = Counter()
        self.count = 0
        self.sent = 1

    @rule(
        wid=st.sampled_from(("w0", "w1")), digest=st.sampled_from(("", "a", "b")), resumed=st.booleans(),
        attempts=st.integers(0, 2), tenant=st.sampled_from(("t0", "t1")), yields=st.booleans(),
        num_virtual=st.sampled_from((0, 50)),
    )  # fmt: skip
    def assign(
        self, wid: str, digest: str, resumed: bool, attempts: int, tenant: str, yields: bool, num_virtual: int
    ) -> None:
        self.count += 1
        item = request(
            f"r{self.count}",
            digest,
            epoch=2 * resumed,
            attempts=attempts * resumed,
            tenant=tenant,
            num_virtual=num_virtual,
        )
        item.output_charged, item.yields = -1 if resumed else 0, yields
        self.lengths[item.rid] = 7 if resumed else 0
        self.assigned[item.rid] = item
        self.ledger.assign(item, self.workers.by_id[wid])
        self.paid[tenant] += item.submit.num_prompt_tokens + num_virtual
        assert item.reserved_tokens == 4 + num_virtual + 4

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
        for wid, worker in self.workers.by_id.items():
            progress = []
            for rid, item in worker.requests.items():
                self.lengths[rid] += data.draw(st.integers(0, 2))
                self._pay(item, self.lengths[rid])
                progress.append((rid, self.lengths[rid]))
            beats[wid] = beat(wid, self.sent, progress=[*progress, ("unknown", 5)], resident=sorted(resident))
        self.workers.observe(beats, 1.0)
        for worker in self.workers.by_id.values():
            self.ledger.observe(worker)

    def _pay(self, item: QueuedRequest, length: int) -> None:
        """A log that existed before this scheduler led is already paid; the rest is paid once."""
        if item.output_charged >= 0:
            self.paid[item.submit.tenant] += 2 * max(0, length - item.output_charged)

    @invariant()
    def counts_are_those_of_a_recount(self) -> None:
        for worker in self.workers.by_id.values():
            items = [item for item in self.assigned.values() if item.wid == worker.wid]
            assert worker.requests == {item.rid: item for item in items}
            assert worker.num_ready == sum(item.ready for item in items)
            assert worker.num_ready_yielding == sum(item.ready and item.yields for item in items)
            assert worker.num_ready_batch == sum(item.ready and item.submit.cls == "batch" for item in items)
            assert worker.num_yielding == sum(item.yields for item in items)
            assert worker.cold == Counter(item.submit.digest for item in items if not item.ready)
            assert worker.by_digest == Counter(item.submit.digest for item in items)
            assert worker.num_tokens == sum(item.reserved_tokens for item in items)
            assert worker.rank_sum == sum(1 + ord(d) for d in {item.submit.digest for item in items} - {""})
            assert worker.suspects == Counter(i.attempts for i in items if i.attempts and not i.started)
        for tenant, tokens in self.paid.items():
            assert self.counters[tenant] == tokens


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=examples.of(100), stateful_step_count=40, deadline=None)
