"""Which worker gets a request."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from protocol.wire import messages as m
from scheduler.backlog import OfferResult
from scheduler.ledger import Ledger
from scheduler.placement import (
    LOAD_BOUND,
    MAX_CANDIDATES,
    SHRINK_TICKS,
    AdapterFacts,
    Bandwidths,
    Homes,
    Placement,
    Rendezvous,
)
from scheduler.request import BASE, QueuedRequest
from scheduler.workers import MAX_LOADS, Tier, Worker, Workers
from tests.scheduler.test_workers import beat, make_ledger, make_workers, request

STEP = m.StepModel(a=0.01, b=1e-5, c=1e-8, d=1e-6)
OUTPUT = 100.0


class Site:
    """Workers with placement and ledger."""

    def __init__(self, *beats: m.WorkerBeat, max_attempts: int = 3) -> None:
        self.workers: Workers = make_workers(*beats)
        self.placement = Placement(self.workers, max_attempts)
        self.ledger: Ledger = make_ledger(self.workers)
        self.placement.refresh()
        self.count = 0

    def choose(
        self, digest: str = "", *, now_ms: float = 0.0, final: bool = False, **more: Any
    ) -> Worker | OfferResult:
        self.count += 1
        return self.place(request(f"r{self.count}", digest, **more), now_ms=now_ms, final=final)

    def place(self, item: QueuedRequest, *, now_ms: float = 0.0, final: bool = False) -> Worker | OfferResult:
        choice = self.placement.choose(item, OUTPUT, now_ms, final=final)
        if isinstance(choice, Worker):
            self.ledger.assign(item, choice)
            self.placement.note_assigned(item, choice, now_ms)
        return choice

    def wid(self, digest: str = "", **more: Any) -> str:
        choice = self.choose(digest, **more)
        assert isinstance(choice, Worker), choice
        return choice.wid

    def fill(self, wid: str) -> None:
        worker = self.workers.by_id[wid]
        while worker.ready_credit("interactive") > 0:
            self.count += 1
            self.ledger.assign(request(f"fill{self.count}"), worker)
        self.placement.refresh()


def beats(num: int, **more: Any) -> list[m.WorkerBeat]:
    return [beat(f"w{i}", step_model=STEP, **more) for i in range(num)]


def home(*members: m.WorkerBeat, digest: str) -> str:
    rendezvous = Rendezvous()
    rendezvous.set_members({b.wid: (b.name, b.capacity) for b in members})
    return rendezvous.order(digest)[0]


def test_the_nearer_an_adapter_is_the_less_it_costs() -> None:
    one, two = beats(2, capacity=64)
    facts = AdapterFacts(16, 20_000_000)
    costs = [Bandwidths(host=2e5, remote=2e4).cost_ms(tier, facts.num_bytes) for tier in Tier]
    assert costs[0] < costs[2] < costs[1] < costs[3]  # half a store transfer takes longer than one from the host
    for near, far in (({"resident": ["d"]}, {"host": ["d"]}), ({"resident": ["d"]}, {"loading": ["d"]})):
        for first, second in ((near, far), (far, near)):
            site = Site(structs.replace(one, **first), structs.replace(two, **second))
            assert site.wid("d") == ("w0" if first is near else "w1"), (near, far)


def test_a_cold_adapter_goes_to_its_home_and_stays_there() -> None:
    members = beats(5, capacity=64)
    for digest in ("a", "b", "c", "d"):
        site = Site(*members)
        assert {site.wid(digest) for _ in range(5)} == {home(*members, digest=digest)}


def test_a_restarted_worker_is_the_home_of_the_same_adapters() -> None:
    before = [beat(f"x{i}", name=f"gpu{i}") for i in range(4)]
    after = [beat(f"y{i}", name=f"gpu{i}") for i in range(4)]
    for i in range(50):
        assert home(*before, digest=f"d{i}")[1:] == home(*after, digest=f"d{i}")[1:]


def test_homes_are_spread_by_capacity_and_move_little() -> None:
    members = {f"w{i}": (f"w{i}", 64) for i in range(4)} | {"big": ("big", 128)}
    rendezvous = Rendezvous()
    rendezvous.set_members(members)
    before = {f"d{i}": rendezvous.order(f"d{i}")[0] for i in range(3000)}
    shares = Counter(before.values())
    assert shares["big"] == pytest.approx(1000, rel=0.12)
    assert all(shares[f"w{i}"] == pytest.approx(500, rel=0.2) for i in range(4))
    rendezvous.set_members(members | {"new": ("new", 64)})
    moved = [digest for digest, wid in before.items() if rendezvous.order(digest)[0] != wid]
    assert all(rendezvous.order(digest)[0] == "new" for digest in moved)
    assert len(moved) == pytest.approx(3000 / 7, rel=0.2)


def test_a_request_waits_for_its_full_warm_worker_as_long_as_a_load_takes() -> None:
    site = Site(beat("w0", step_model=STEP, resident=["d"], capacity=4), *beats(3, capacity=64)[1:])
    site.fill("w0")
    patience_ms = site.placement.bandwidths.cost_ms(Tier.REMOTE, 20_000_000)
    item = request("waits", "d")
    assert site.place(item, now_ms=1000.0) is OfferResult.HELD
    assert site.place(item, now_ms=999.0 + patience_ms) is OfferResult.HELD
    assert item.held_until_ms == 1000.0 + patience_ms
    choice = site.place(item, now_ms=1000.0 + patience_ms)
    assert isinstance(choice, Worker)
    assert choice.wid != "w0"
    assert isinstance(site.choose("d", final=True), Worker)


def test_a_request_for_the_base_is_never_held() -> None:
    site = Site(beat("w0", capacity=1), beat("w1", capacity=64))
    site.fill("w0")
    assert site.wid() == "w1"


def test_blocked_when_no_worker_may_take_it() -> None:
    site = Site(beat("w0", capacity=1, resident=["d"]))
    site.fill("w0")
    assert site.choose("d") is OfferResult.BLOCKED
    assert site.choose() is OfferResult.BLOCKED
    assert isinstance(site.choose("cold"), Worker)  # it takes no capacity until its adapter is loaded
    assert site.choose("colder") is OfferResult.BLOCKED
    assert not site.placement.has_room(request("x"))


@settings(deadline=None, max_examples=examples.of(60))
@given(st.lists(st.tuples(st.sampled_from(["", "a", "b", "c", "d"]), st.integers(1, 500)), max_size=150))
def test_no_worker_gets_more_than_its_bound_while_others_are_free(items: list[tuple[str, int]]) -> None:
    capacities = (16, 16, 48)
    site = Site(*(beat(f"w{i}", capacity=c, resident=["a"] if i else ["b"]) for i, c in enumerate(capacities)))
    total = sum(capacities)
    for digest, num_prompt in items:
        num_before = sum(worker.load for worker in site.workers.by_id.values())
        choice = site.choose(digest, final=True, num_prompt_tokens=num_prompt)
        if not isinstance(choice, Worker):
            continue
        capacity = choice.beat.capacity
        bound = max(LOAD_BOUND * (num_before + 1) * capacity / total, 0.75 * capacity)
        others = [w for w in site.workers.by_id.values() if w is not choice and _free(w, digest)]
        if others and choice.load > bound:
            crowded = [
                w.load + 1 > max(LOAD_BOUND * (num_before + 1) * w.beat.capacity / total, 0.75 * w.beat.capacity)
                for w in others
            ]
            assert all(crowded)
        assert choice.num_ready <= capacity + 2
        assert choice.num_cold <= capacity
        assert len(choice.cold) <= MAX_LOADS


def _free(worker: Worker, digest: str) -> bool:
    if worker.tier(digest) is Tier.RESIDENT:
        return worker.ready_credit("interactive") > 0
    return worker.ready_credit("interactive") > 0 and worker.takes_cold(digest, "interactive")


def test_equal_workers_are_loaded_equally() -> None:
    site = Site(*beats(4, capacity=64))
    loads = Counter(site.wid() for _ in range(128))
    assert max(loads.values()) - min(loads.values()) <= 1


def test_a_hot_adapter_gets_homes_in_proportion_to_its_load() -> None:
    site = Site(*beats(8, capacity=64))
    new = site.placement.tick({"hot": 40, "warm": 20, "rare": 1})  # nothing runs: a worker's share is 8 requests
    assert Counter(digest for _, digest in new) == {"hot": 5, "warm": 3}
    assert site.placement.tick({"hot": 40, "warm": 20, "rare": 1}) == []
    assert [site.placement.homes[digest] for digest in ("hot", "warm", "rare", "other")] == [5, 3, 1, 1]
    for _ in range(160):
        site.choose()
    site.placement.refresh()
    site.placement.tick({"hot": 40})  # 20 each are running: a share is 25
    for _ in range(SHRINK_TICKS * 3):
        site.placement.tick({"hot": 40})
    assert site.placement.homes["hot"] == 2
    homes = site.placement.group("").rendezvous.order("hot")[:2]
    assert {site.wid("hot") for _ in range(8)} <= set(homes)


def test_homes_grow_at_once_and_shrink_one_by_one_after_a_while() -> None:
    homes = Homes()
    homes.tick({"d": 10}, 2.0)
    assert homes["d"] == 5
    sizes = []
    for _ in range(5 * SHRINK_TICKS):
        homes.tick({}, 2.0)
        sizes.append(homes["d"])
    assert sizes == [5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 1]
    homes.tick({"d": 10}, 2.0)
    homes.tick({"d": 8}, 2.0)
    homes.tick({"d": 9}, 2.0)
    assert homes["d"] == 5


def test_ranks_in_a_batch_count() -> None:
    """If two workers are equally loaded, the one whose step grows less is chosen."""
    step = m.StepModel(a=0.01, b=1e-5, c=0.0, d=1e-4)
    site = Site(*(beat(f"w{i}", step_model=step, resident=["a", "b"], capacity=64) for i in range(2)))
    first = site.wid("a")
    other = "w1" if first == "w0" else "w0"
    assert site.wid("b") == other
    assert site.wid("a") == first
    assert site.wid("b") == other


def test_virtual_tokens_are_prefilled_like_a_prompt() -> None:
    """For virtual tokens, as for a prompt, a worker with fast prefills is preferred to one with fast steps."""
    steps, prefills = m.StepModel(a=0.01, b=1e-4, c=0.0, d=0.0), m.StepModel(a=0.011, b=0.0, c=0.0, d=0.0)

    def taken(**more: Any) -> str:
        return Site(beat("steps", step_model=steps), beat("prefills", step_model=prefills)).wid(**more)

    assert taken() == "steps"
    assert taken(num_prompt_tokens=2000) == taken(num_virtual=2000) == "prefills"


def test_equal_beginnings_go_to_the_same_worker_if_it_is_as_free() -> None:
    site = Site(*beats(4, capacity=64))
    first = site.wid(prefix="p", num_prompt_tokens=2000)
    later = [site.wid(prefix="p", num_prompt_tokens=2000, now_ms=100.0 * i) for i in range(1, 4)]
    assert later == [first] * 3
    assert site.wid(prefix="q", num_prompt_tokens=2000, now_ms=400.0) != first


def test_requests_whose_worker_died_start_in_small_groups() -> None:
    site = Site(beat("w0", capacity=64))
    hit = [site.choose(epoch=2, attempts=1) for _ in range(10)]
    assert [isinstance(choice, Worker) for choice in hit] == [True] * 8 + [False] * 2
    assert isinstance(site.choose(), Worker)
    site = Site(beat("w0", capacity=64), beat("w1", capacity=64))
    last = [site.choose(epoch=4, attempts=2) for _ in range(3)]
    assert [isinstance(choice, Worker) for choice in last] == [True, True, False]
    assert isinstance(site.choose(epoch=2, attempts=1), Worker)
    for worker in site.workers.by_id.values():
        held = {rid: r for rid, r in worker.requests.items() if r.attempts == 2}
        done = [(rid, 7) for rid in held]
        site.workers.observe({**_all(site), worker.wid: beat(worker.wid, 2, progress=done, capacity=64)}, 1.0)
        site.ledger.observe(worker)
        site.workers.observe({**_all(site), worker.wid: beat(worker.wid, 3, progress=[(rid, 8) for rid in held])}, 1.0)
        site.ledger.observe(worker)
    assert isinstance(site.choose(epoch=4, attempts=2), Worker)


def _all(site: Site) -> dict[str, m.WorkerBeat | None]:
    return {wid: worker.beat for wid, worker in site.workers.by_id.items()}


def test_of_many_workers_each_gets_work_and_warm_ones_are_found() -> None:
    members = [beat(f"w{i}", capacity=8, resident=["d"] if i == 57 else [], step_model=STEP) for i in range(64)]
    site = Site(*members)
    assert len(site.placement._available) > MAX_CANDIDATES
    assert site.wid("d") == "w57"
    loads = Counter(site.wid() for _ in range(500))
    assert len(loads) == 64
    for _ in range(12):
        site.choose()
    assert all(worker.num_ready <= 10 for worker in site.workers.by_id.values())


def test_what_is_known_of_adapters_is_bounded() -> None:
    """The adapter looked up least recently is forgotten, and is looked up again when it is requested."""
    placement = Placement(make_workers(), 3, max_known_adapters=3)
    for i in (0, 1, 2, 0, 3):
        placement.learn(f"a{i}", AdapterFacts(rank=i, num_bytes=1))
    assert placement.unknown({"a0", "a1", "a2", "a3", BASE}) == ["a1"]
    assert (placement.rank_of("a3"), placement.rank_of("a1")) == (3, 16)


def test_a_request_goes_only_to_workers_that_know_its_fields() -> None:
    """Older ones would ignore unknown fields, and give a different answer."""
    newest = beat("new", step_model=STEP, capacity=64, knows=["later", "last"])
    site = Site(*beats(MAX_CANDIDATES - 1, capacity=64), newest)
    assert {site.wid(needs=["later"]) for _ in range(20)} == {"new"}
    assert len({site.wid() for _ in range(20)}) > 1
    assert site.choose(needs=["later", "unheard_of"]) is OfferResult.BLOCKED
    assert site.placement.has_room(request("r", needs=["unheard_of"]))  # others may be served in the meantime
    site.fill("new")
    assert site.choose(needs=["later"]) is OfferResult.BLOCKED


@pytest.mark.parametrize("digest", ["", "cold"])
def test_the_newest_worker_is_found_among_many(digest: str) -> None:
    site = Site(*beats(10 * MAX_CANDIDATES, capacity=64), beat("new", step_model=STEP, capacity=64, knows=["later"]))
    assert site.wid(digest, needs=["later"], final=True) == "new"
