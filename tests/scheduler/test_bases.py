"""Several bases in one fleet: each request goes to a worker of its base, and no base's requests block another's."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.wire import messages as m
from scheduler.backlog import MAX_QUEUES_PER_VISIT
from scheduler.config import SchedulerConfig
from scheduler.core import MAX_PLACED, MAX_REFUSED, Scheduler
from scheduler.workers import QUEUED_AHEAD
from tests.scheduler.fakes import make_submit

FLOOD = 4 * MAX_REFUSED * MAX_QUEUES_PER_VISIT


def beat(wid: str, base: str, *, capacity: int = 4, **more: Any) -> m.WorkerBeat:
    return m.WorkerBeat(wid=wid, name=wid, base=base, capacity=capacity, sent_ms=1, **more)


def scheduler_of(*beats: m.WorkerBeat, bases: str = "ab", **config: Any) -> Scheduler:
    """Return a scheduler of a fleet with one-letter bases, the first one being the default."""
    scheduler = Scheduler(SchedulerConfig(**config))
    scheduler.set_bases(bases)
    scheduler.beats({one.wid: one for one in beats}, 0.0)
    return scheduler


def planned(scheduler: Scheduler, now_ms: float = 0.0) -> dict[str, list[str]]:
    return {wid: [r.rid for r in batch] for wid, batch in scheduler.plan(now_ms).batches.items()}


@pytest.mark.parametrize("digest", ["", "x"])
def test_a_request_goes_to_a_worker_of_its_base_only(digest: str) -> None:
    scheduler = scheduler_of(beat("wa", "a"), beat("wb", "b", capacity=64))
    for i in range(20):
        scheduler.submit(make_submit(f"{'ab'[i % 2]}{i}", base="ab"[i % 2], digest=digest), 0)
    plan = planned(scheduler)
    assert {rid[0] for rid in plan["wa"]} == {"a"}
    assert {rid[0] for rid in plan["wb"]} == {"b"}
    assert len(plan["wb"]) == 10  # although the other base's worker is full


def test_an_adapter_on_another_bases_worker_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same adapter may be served on two bases of one layout."""
    many = [beat(f"wa{i}", "a", resident=["x"]) for i in range(20)]  # more than the number of candidates per request
    scheduler = scheduler_of(*many, beat("wb", "b"))
    scheduler.submit(make_submit("r", base="b", digest="x"), 0)
    assert planned(scheduler) == {"wb": ["r"]}


def test_an_adapter_is_fetched_ahead_by_a_worker_of_its_base() -> None:
    scheduler = scheduler_of(*(beat(f"wa{i}", "a") for i in range(8)), beat("wb", "b", capacity=1))
    for i in range(8):
        scheduler.submit(make_submit(f"r{i}", base="b"), 0)
    planned(scheduler)
    digests = [f"d{i}" for i in range(20)]
    for digest in digests:
        scheduler.submit(make_submit(digest, base="b", digest=digest), 0)
    fetched = scheduler.plan(0.0).prefetches
    assert fetched
    assert {wid for wid, _ in fetched} == {"wb"}


@pytest.mark.parametrize("epoch", [0, 1], ids=["new", "handed back"])
def test_a_flood_for_a_base_without_workers_holds_up_nobody(epoch: int) -> None:
    scheduler = scheduler_of(beat("wa", "a"))
    for i in range(max(FLOOD, 2 * MAX_PLACED)):
        digest = f"d{i % 50}" if i % 2 else ""
        scheduler.submit(make_submit(f"b{i}", tenant=f"t{i % 500}", base="b", digest=digest), epoch)
    scheduler.submit(make_submit("a", tenant="last", base="a"), epoch)
    assert planned(scheduler) == {"wa": ["a"]}


def test_a_flood_for_a_full_base_holds_up_nobody() -> None:
    scheduler = scheduler_of(beat("wa", "a"), beat("wb", "b"))
    for i in range(FLOOD):
        scheduler.submit(make_submit(f"b{i}", tenant=f"t{i % 500}", base="b"), 0)
    assert len(planned(scheduler)["wb"]) == 4 + QUEUED_AHEAD
    scheduler.submit(make_submit("a", tenant="t0", base="a"), 0)
    assert planned(scheduler) == {"wa": ["a"]}


def test_what_a_tenant_had_of_one_base_counts_at_another() -> None:
    scheduler = scheduler_of(beat("wa", "a", capacity=64), beat("wb", "b", capacity=1))
    for i in range(8):
        scheduler.submit(make_submit(f"first{i}", tenant="other", base="b"), 0)
    planned(scheduler)
    for i in range(32):
        scheduler.submit(make_submit(f"a{i}", tenant="rich", base="a", num_prompt_tokens=500), 0)
    planned(scheduler)
    for tenant in ("rich", "poor"):
        scheduler.submit(make_submit(tenant, tenant=tenant, base="b"), 0)
    order: list[str] = []
    while len(order) < 2:
        for wid, rids in [("wb", list(scheduler.workers.by_id["wb"].requests))]:
            scheduler.ended(m.Ended(rids[0], wid, 1, 1))
        order += [rid for rid in planned(scheduler).get("wb", []) if not rid.startswith("first")]
    assert order == ["poor", "rich"]


def test_a_share_is_one_of_the_places_of_a_base() -> None:
    """So a tenant that holds all slots of one base yields there, however many slots other bases have."""
    scheduler = scheduler_of(beat("wa", "a", capacity=1000), beat("wb", "b", capacity=8))
    for tenant in ("many", "few"):
        for i in range(40 if tenant == "many" else 1):
            scheduler.submit(make_submit(f"{tenant}{i}", tenant=tenant, base="b"), 0)
    batch = scheduler.plan(0.0).batches["wb"]
    assert {request.submit.tenant for request in batch if request.yields} == {"many"}


def test_calls_end_when_no_worker_of_their_base_comes_in_time() -> None:
    scheduler = scheduler_of(beat("wa", "a"), wait_for_worker_s=10.0)
    scheduler.submit(make_submit("a", base="a", submitted_ms=0), 0)
    scheduler.submit(make_submit("b", base="b", submitted_ms=0), 0)
    scheduler.submit(make_submit("job", base="b", submitted_ms=0, gateway=""), 0)
    assert scheduler.unserved(0.0) == []
    assert scheduler.unserved(9_999.0) == []
    assert scheduler.unserved(10_000.0) == ["b"]
    scheduler.beats({"wa": beat("wa", "a"), "wb": beat("wb", "b")}, 1.0)
    assert scheduler.unserved(20_000.0) == []


def test_the_status_says_what_each_base_has() -> None:
    scheduler = scheduler_of(beat("wa", "a"), beat("wa2", "a"))
    for i in range(3):
        scheduler.submit(make_submit(f"b{i}", base="b"), 0)
    scheduler.submit(make_submit("a", base="a"), 0)
    scheduler.plan(0.0)
    assert scheduler.bases() == {"a": m.BaseLoad(2, 0, 1), "b": m.BaseLoad(0, 3, 0)}


def test_the_last_worker_of_a_base_is_not_the_next_to_go() -> None:
    busy = [beat("wa", "a", resident=["x", "y"]), beat("wa2", "a", resident=["z"])]
    assert scheduler_of(*busy, beat("wb", "b")).drain_next(0.0) in ("wa", "wa2")
    assert scheduler_of(beat("wa", "a"), beat("wb", "b")).drain_next(0.0) in ("wa", "wb")


@pytest.mark.parametrize("bases", ["", "a"])
def test_a_fleet_of_one_base_asks_for_no_name(bases: str) -> None:
    """Requests queued before its worker returned under another name also run."""
    scheduler = scheduler_of(beat("w", "a"), bases=bases)
    for base in ("a", "", "as it was called before"):
        scheduler.submit(make_submit(f"r{base}", base=base), 0)
    assert scheduler.unserved(1e12) == []
    assert planned(scheduler) == {"w": ["ra", "r", "ras it was called before"]}
    assert scheduler.bases() == {"a": m.BaseLoad(1, 0, 3)}


@pytest.mark.parametrize("digest", ["", "x"])
def test_requests_find_their_base_when_there_come_to_be_several(digest: str) -> None:
    scheduler = scheduler_of(beat("wa", "a", capacity=2), bases="a")
    for i in range(8):
        scheduler.submit(make_submit(f"a{i}", base="a", digest=digest, tenant="t"), 0)
    scheduler.submit(make_submit("handed back", base="a", digest=digest), 1)
    running = planned(scheduler)["wa"]
    scheduler.set_bases("ab")
    scheduler.beats({"wa": beat("wa", "a", capacity=2), "wb": beat("wb", "b", capacity=64)}, 0.0)
    scheduler.submit(make_submit("b", base="b", digest=digest), 0)
    assert planned(scheduler) == {"wb": ["b"]}
    assert scheduler.backlog.num_queued == 9 - len(running)
    assert sum(scheduler.shares("a").num_open.values()) == 9
    for rid in running:
        scheduler.ended(m.Ended(rid, "wa", 2 if rid == "handed back" else 1, 1))
    assert planned(scheduler)["wa"]
    assert sum(scheduler.shares("a").num_open.values()) == 9 - len(running)
    scheduler.set_bases("c")
    for wid in ("wa", "wb"):
        scheduler.remove_worker(wid)
    scheduler.beats({"wc": beat("wc", "c", capacity=64)}, 0.0)
    queued = scheduler.backlog.num_queued
    assert queued
    assert len(planned(scheduler)["wc"]) == queued


def test_queues_of_bases_that_are_asked_no_more_are_forgotten() -> None:
    scheduler = scheduler_of(beat("w", "a"))
    for i in range(300):
        scheduler.submit(make_submit(f"r{i}", base=f"stranger {i}"), 0)
        scheduler.plan(0.0)
        scheduler.forget(f"r{i}")
    scheduler.submit(make_submit("r", base="a"), 0)
    scheduler.plan(0.0)
    assert len(scheduler.backlog.by_base) == 1
    assert len(scheduler._shares) <= 2
    assert len(scheduler.placement._groups) <= 256
