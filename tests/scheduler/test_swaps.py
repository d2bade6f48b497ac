"""Which worker swaps to which base, and when: single decisions, and properties of all histories."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from scheduler.swaps import LOST_MS, LOST_STARTS, MAX_LOSS, TICK_MS, BaseDemand, Seat, Swap, SwapPolicy

START_S = 3.0
MAX_WAIT_S, RESIDENCY_S = 30.0, 5.0
NOW_MS = 1_000_000.0


class Policy(SwapPolicy):
    def told(self, *facts: Any) -> list[tuple[str, str, str]]:
        """Return the worker, the base and the reason of each order."""
        return [(one.seat.wid, one.base, one.why) for one in self.decide(*facts)]


def make(max_wait_s: float = MAX_WAIT_S) -> Policy:
    return Policy(max_wait_s, RESIDENCY_S)


def base(name: str, waiting_s: float = 0.0, waits_s: float | None = None, now_ms: float = NOW_MS, **more: Any) -> Any:
    """Return a base's demand. waits_s: how long its first request has been waiting."""
    if waiting_s and waits_s is None:
        waits_s = 1.0
    oldest_ms = None if waits_s is None else now_ms - 1000 * waits_s
    return BaseDemand(
        name, **{"shares": 1.0, "start_s": START_S, **more, "waiting_s": waiting_s, "oldest_ms": oldest_ms}
    )


def seat(wid: str, of: str, running: int = 0, stayed_s: float = 100.0, now_ms: float = NOW_MS, **more: Any) -> Seat:
    more = {"may_become": frozenset("abcdefghij"), **more}
    return Seat(wid, of, now_ms - 1000 * stayed_s, running, **more)


# ------------------------------------------------------------ single decisions


def test_an_idle_worker_goes_to_the_base_that_waits_longest() -> None:
    demands = [base("a"), base("b", 9.0, waits_s=1.0), base("c", 1.0, waits_s=2.0)]
    assert make().told(NOW_MS, demands, [seat("w", "a")]) == [("w", "c", "idle")]


def test_an_idle_worker_goes_at_once_and_a_busy_one_stays() -> None:
    demands = [base("a"), base("b", 1.0)]
    assert make().told(NOW_MS, demands, [seat("w", "a", stayed_s=0.0)]) == [("w", "b", "idle")]
    assert make().told(NOW_MS, demands, [seat("w", "a", running=1)]) == []
    assert make().told(NOW_MS, [base("a", 1.0), base("b", 1.0)], [seat("w", "a")]) == [], "something waits for it"


@pytest.mark.parametrize(("used", "leaves"), [({"a": 0.6, "b": 0.2}, "b1"), ({"a": 0.2, "b": 0.6}, "a1")])
def test_of_idle_workers_that_of_the_least_used_base_goes(used: dict[str, float], leaves: str) -> None:
    policy = make()
    policy.used, policy._last_ms = used, NOW_MS
    demands = [base("a"), base("b"), base("c", 1.0)]
    assert policy.told(NOW_MS, demands, [seat("a1", "a"), seat("b1", "b")]) == [(leaves, "c", "idle")]


def test_no_worker_goes_where_nothing_waits() -> None:
    assert make().told(NOW_MS, [base("a"), base("b")], [seat("w", "a"), seat("v", "a")]) == []


def test_a_worker_becomes_only_what_it_may() -> None:
    demands = [base("a"), base("b", 1.0)]
    seats = [seat("w", "a", may_become=frozenset({"a", "c"})), seat("v", "a", may_become=frozenset({"a", "b"}))]
    assert make().told(NOW_MS, demands, seats) == [("v", "b", "idle")]
    assert make().told(NOW_MS, demands, seats[:1]) == []
    assert make().told(NOW_MS, demands, [seat("w", "a", may_become=frozenset())]) == []


@pytest.mark.parametrize(("waits_s", "wanted"), [(28.0, []), (29.5, [("w", "b", "bound")])])
def test_a_busy_worker_leaves_just_before_another_base_is_due(
    waits_s: float, wanted: list[tuple[str, str, str]]
) -> None:
    demands = [base("a", 5.0), base("b", 1.0, waits_s=waits_s)]
    assert make().told(NOW_MS, demands, [seat("w", "a", running=1)]) == wanted


@pytest.mark.parametrize(("waits_s", "wanted"), [(20.5, []), (21.5, [("w", "b", "bound")])])
def test_it_leaves_earlier_where_two_bases_wait(waits_s: float, wanted: list[Any]) -> None:
    """Each takes a start and a residency, so the first leaves 8 s before the second is due."""
    demands = [base("a", 5.0), base("b", 1.0, waits_s=waits_s), base("c", 1.0, waits_s=waits_s)]
    assert make().told(NOW_MS, demands, [seat("w", "a", running=1)]) == wanted


def test_no_worker_leaves_work_before_its_residency_is_over() -> None:
    demands = [base("a", 5.0), base("b", 1.0, waits_s=99.0)]
    assert make().told(NOW_MS, demands, [seat("w", "a", running=1, stayed_s=4.9)]) == []
    assert make().told(NOW_MS, demands, [seat("w", "a", running=1, stayed_s=5.0)]) == [("w", "b", "bound")]


def test_that_worker_goes_whose_base_is_most_beyond_its_share() -> None:
    demands = [base("a", 5.0, shares=3.0), base("b", 5.0, shares=1.0), base("c", 1.0, waits_s=30.0)]
    seats = [seat("a1", "a", 1), seat("a2", "a", 1), seat("b1", "b", 1), seat("b2", "b", 1)]
    ((wid, base_name, _),) = make().told(NOW_MS, demands, seats)
    assert (wid, base_name) in (("b1", "c"), ("b2", "c"))


def test_a_flood_beyond_its_share_leaves_at_its_turns_end() -> None:
    policy, seats = make(), [seat("w", "a", running=1, stayed_s=13.0)]
    flood = [base("a", 100.0), base("b", 1.0, waits_s=0.0)]
    assert policy.told(NOW_MS, flood, seats) == [("w", "b", "turn")], "it has had all"
    fresh = make()
    fresh.used, fresh._last_ms = {"a": 0.2, "b": 0.8}, NOW_MS
    assert fresh.told(NOW_MS, flood, seats) == [], "it has had less"
    early = [seat("w", "a", running=1, stayed_s=11.0)]
    assert make().told(NOW_MS, flood, early) == [], "a turn of four starts is not over"
    assert make().told(NOW_MS, [base("a", 20.0), flood[1]], seats) == [], "it is soon through"


@pytest.mark.parametrize(
    ("used", "waits_s", "wanted"),
    [
        (0.5, 31.0, []),
        (0.5, 89.5, [("w", "b", "bound")]),  # starts take a tenth of the time: 9 s of 90 s
        (0.9, 31.0, [("w", "b", "bound")]),  # beyond its share, 5 of 7
    ],
)
def test_a_base_within_its_share_works_off_what_most_tenants_wait_for(
    used: float, waits_s: float, wanted: list[Any]
) -> None:
    policy = make()
    policy.used, policy._last_ms = {"a": used, "b": 0.1, "c": 0.1}, NOW_MS
    busy = base("a", 500.0, shares=5.0, typical_s=100.0)
    seats = [seat("w", "a", running=8, stayed_s=10.0)]
    others = [base("b", 1.0, waits_s=waits_s, typical_s=1.0), base("c", 1.0, waits_s=0.0, typical_s=1.0)]
    assert policy.told(NOW_MS, [busy, *others], seats) == wanted
    one_flood = BaseDemand("a", START_S, 1.0, 500.0, NOW_MS, 500.0)
    late = [base("b", 1.0, waits_s=31.0, shares=5.0, typical_s=1.0), others[1]]
    policy.used, policy._last_ms = {"a": 0.1, "b": 0.8, "c": 0.1}, NOW_MS
    assert policy.told(NOW_MS, [one_flood, *late], seats) == [("w", "b", "bound")], "few tenants have much work"


@pytest.mark.parametrize(("used", "first"), [(0.2, "b"), (0.6, "c")])
def test_much_work_makes_only_a_base_beyond_its_share_wait(used: float, first: str) -> None:
    policy = make()
    policy.used, policy._last_ms = {"a": 0.8 - used, "b": used, "c": 0.2}, NOW_MS
    demands = [base("a"), base("b", 500.0, waits_s=9.0, typical_s=500.0), base("c", 1.0, waits_s=8.0, typical_s=1.0)]
    assert policy.told(NOW_MS, demands, [seat("w", "a")]) == [("w", first, "idle")]


@pytest.mark.parametrize(("waiting_s", "most"), [(20.0, 0.1), (2000.0, 0.1), (1.0, 0.2)])
def test_starts_take_a_tenth_of_the_time_where_all_have_much_work(waiting_s: float, most: float) -> None:
    """Three bases with the same shares and one worker; with little work the bound is kept, and starts take a fifth."""
    policy, of, since_s, starts_s, waits_since_s = make(), "a", 0.0, 0.0, dict.fromkeys("abc", 0.0)
    for second in range(1, 3000):
        if second < since_s:  # it is starting
            continue
        waits_since_s[of] = second - 1.0
        demands = [
            base(name, waiting_s, waits_s=second - waits_since_s[name], now_ms=1000.0 * second, typical_s=waiting_s)
            for name in "abc"
        ]
        worker = seat("w", of, running=8, stayed_s=second - since_s, now_ms=1000.0 * second)
        for _, name, _ in policy.told(1000.0 * second, demands, [worker]):
            waits_since_s[of], of, since_s = float(second), name, second + START_S
            starts_s += START_S
    assert 0.04 < starts_s / 3000 <= most


# ------------------------------------------------------------ pending orders


def test_an_order_on_its_way_is_not_given_again() -> None:
    policy, demands = make(), [base("a"), base("b", 1.0)]
    seats = [seat("w1", "a", name="one"), seat("w2", "a", name="two")]
    (swap,) = policy.decide(NOW_MS, demands, seats)
    assert (swap.at_ms, swap.seat.base) == (NOW_MS, "a")
    left = [one for one in seats if one != swap.seat]
    assert policy.told(NOW_MS + 2000, demands, left, [swap]) == []
    there = [*left, seat("w3", "b", running=1, stayed_s=0.0, now_ms=NOW_MS + 4000, name=swap.seat.name)]
    assert policy.told(NOW_MS + 4000, demands, there) == []


def test_an_order_that_came_to_nothing_is_decided_again() -> None:
    """The worker still announces base `b`, or has died during the swap, and another worker is there."""
    policy, order = make(), Swap(seat("w1", "a"), "b", "idle", NOW_MS)
    late_ms = NOW_MS + 1000 * LOST_STARTS * START_S + LOST_MS
    demands = [base("a"), base("b", 1.0, waits_s=20.0, now_ms=late_ms)]
    left = [seat("w3", "a", name="three", now_ms=late_ms)]
    assert policy.decide(late_ms - 1, demands, left, [order]) == []
    assert [swap.base for swap in policy.decide(late_ms, demands, left, [order])] == ["b"]


def test_a_base_whose_start_failed_has_no_worker_on_its_way() -> None:
    policy, order = make(), Swap(seat("w1", "a"), "b", "idle", NOW_MS)
    assert policy.told(NOW_MS, [base("a")], [seat("v", "a")], [order]) == []
    assert policy.told(NOW_MS + 1000, [base("a"), base("b", 1.0)], [seat("v", "a")]) == [("v", "b", "idle")]


# ------------------------------------------------------------ more workers than bases


def test_one_more_worker_helps_where_work_piles_up() -> None:
    seats = [seat("a1", "a", 1), seat("b1", "b", 1), seat("b2", "b")]
    assert make().told(NOW_MS, [base("a", 6.0), base("b")], seats) == [], "two starts of work are soon done"
    assert make().told(NOW_MS, [base("a", 7.0), base("b")], seats) == [("b2", "a", "load")]


def test_one_of_several_idle_workers_helps_at_once() -> None:
    """Its base has another one for its next request, unlike a base with one idle worker."""
    seats = [seat("a1", "a", 1), seat("b1", "b"), seat("b2", "b")]
    assert make().told(NOW_MS, [base("a", 0.2), base("b")], seats) == []
    ((_, helped, why),) = make().told(NOW_MS, [base("a", 1.0), base("b")], seats)
    assert (helped, why) == ("a", "load")
    more = [*seats, seat("b3", "b"), seat("b4", "b")]
    (order,) = make().decide(NOW_MS, [base("a", 6.0), base("b")], more)  # one at a time
    assert make().told(NOW_MS, [base("a", 11.0), base("b")], [one for one in more if one != order.seat], [order]) == []
    young = [seats[0], *(seat(one.wid, "b", stayed_s=29.0) for one in seats[1:])]
    assert make().told(NOW_MS, [base("a", 1.0), base("b")], young) == [], "starts take at most a tenth of their time"


def test_the_last_worker_of_a_base_helps_after_one_start_without_work() -> None:
    policy, demands = make(), [base("a", 60.0), base("b"), base("c")]
    seats = [seat("a1", "a", 1), seat("b1", "b"), seat("c1", "c", 1)]
    assert policy.told(NOW_MS, demands, seats) == []
    assert policy.told(NOW_MS + 2900, demands, seats) == []
    assert policy.told(NOW_MS + 3000, demands, seats) == [("b1", "a", "load")]


def test_workers_follow_shares_where_all_are_overloaded() -> None:
    demands = [base("a", 900.0, shares=3.0), base("b", 900.0, shares=1.0)]
    for wanted_a, num_a in ((3, 1), (3, 2), (3, 3), (3, 4)):
        seats = [seat(f"w{i}", "a" if i < num_a else "b", 1) for i in range(4)]
        policy, num = make(), Counter(one.base for one in seats)
        for swap in policy.decide(NOW_MS, demands, seats):
            num[swap.seat.base] -= 1
            num[swap.base] += 1
        assert num["a"] == wanted_a


def test_where_nobody_is_a_whole_worker_beyond_its_share_nobody_moves() -> None:
    demands = [base(name, 900.0) for name in "abc"]
    assert (
        make().told(NOW_MS, demands, [seat("1", "a", 1), seat("2", "a", 1), seat("3", "b", 1), seat("4", "c", 1)]) == []
    )


# ------------------------------------------------------------ histories


@dataclass
class Member:
    name: str
    base: str
    since_ms: float = 0.0
    num_joins: int = 0
    left_ms: float = 0.0  # remaining for its request
    joins_ms: float | None = None

    @property
    def wid(self) -> str:
        return f"{self.name} {self.num_joins}"


@dataclass
class Fleet:
    """Workers that serve one request at a time, in steps of a second. A swap begins after a second."""

    starts_s: dict[str, float]
    num_workers: int
    shares: dict[str, float] = field(default_factory=dict[str, float])
    policy: SwapPolicy = field(default_factory=make)
    of_many: bool = False  # the work of a base is that of many tenants

    def __post_init__(self) -> None:
        names = list(self.starts_s)
        self.members = [Member(f"w{i}", names[i % len(names)]) for i in range(self.num_workers)]
        self.waiting: dict[str, list[tuple[float, float]]] = {name: [] for name in names}  # (waiting since, ms of work)
        self.unserved_ms: dict[str, float] = {}
        self.had_ms = dict.fromkeys(names, 0.0)
        self.swaps: list[tuple[float, str, str, str]] = []
        self.on_way: dict[str, Swap] = {}
        self.now_ms = 0.0
        self.longest_ms = 0.0

    def ask(self, name: str, work_s: float) -> None:
        self.waiting[name].append((self.now_ms, 1000 * work_s))

    def step(self) -> None:
        self.now_ms += TICK_MS
        for one in self.members:
            if one.joins_ms is not None and one.joins_ms <= self.now_ms:
                one.joins_ms, one.since_ms, one.num_joins = None, self.now_ms, one.num_joins + 1
                del self.on_way[one.name]
            if one.joins_ms is None:
                self._serve(one)
        served = {one.base for one in self.members if one.joins_ms is None}
        for name, queue in self.waiting.items():
            if name in served or not queue:
                self.unserved_ms.pop(name, None)
            else:
                since_ms = self.unserved_ms.setdefault(name, self.now_ms)
                self.longest_ms = max(self.longest_ms, self.now_ms - since_ms)
        self._decide()

    def _serve(self, one: Member) -> None:
        had_ms = 0.0
        while had_ms < TICK_MS and (one.left_ms > 0 or self.waiting[one.base]):
            if one.left_ms <= 0:
                _, one.left_ms = self.waiting[one.base].pop(0)
            now_ms = min(one.left_ms, TICK_MS - had_ms)
            one.left_ms -= now_ms
            had_ms += now_ms
        self.had_ms[one.base] += had_ms

    def _decide(self) -> None:
        demands = [
            BaseDemand(name, self.starts_s[name], self.shares.get(name, 1.0), sum(ms for _, ms in queue) / 1000,
                       queue[0][0] if queue else None, sum(ms for _, ms in queue) / 1000 if self.of_many else 0.0)
            for name, queue in self.waiting.items()
        ]  # fmt: skip
        here = {one.wid: one for one in self.members if one.joins_ms is None}
        seats = [
            Seat(wid, one.base, one.since_ms, int(one.left_ms > 0), frozenset(self.waiting), name=one.name)
            for wid, one in here.items()
        ]
        swaps = self.policy.decide(self.now_ms, demands, seats, self.on_way.values())
        assert len({swap.seat.wid for swap in swaps}) == len(swaps)
        for swap in swaps:
            one = here[swap.seat.wid]
            assert swap.base != one.base
            is_idle = one.left_ms <= 0 and not self.waiting[one.base]
            assert is_idle or self.now_ms - one.since_ms >= 1000 * RESIDENCY_S, "no swap before the residency is over"
            if one.left_ms > 0:
                self.waiting[one.base].insert(0, (self.now_ms, one.left_ms))
            self.swaps.append((self.now_ms, one.base, swap.base, swap.why))
            one.left_ms, one.base = 0.0, swap.base
            one.joins_ms = self.now_ms + 1000 * self.starts_s[swap.base]
            self.on_way[one.name] = swap


@pytest.mark.parametrize("of_many", [False, True])
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(n, marks=pytest.mark.thorough) for n in range(6, 60))])
def test_no_base_waits_longer_than_the_bound_and_a_start(seed: int, *, of_many: bool) -> None:
    """For any demand: occasional, in bursts, floods of some bases or all.

    of_many: each base has many tenants, so that the bound may be longer until starts take a tenth of the time.
    """
    rng = random.Random(seed)
    num_bases, num_workers = rng.choice([(2, 1), (3, 1), (3, 2), (5, 2), (6, 3), (10, 4), (4, 6)])
    starts_s = {name: rng.uniform(1.0, 3.0) for name in "abcdefghij"[:num_bases]}
    assert (sum(starts_s.values()) + num_bases * RESIDENCY_S) / num_workers <= MAX_WAIT_S, "arithmetic allows it"
    shares = {name: rng.choice([0.1, 1.0, 5.0]) for name in starts_s}
    fleet = Fleet(starts_s, num_workers, shares, of_many=of_many)
    kinds = {name: rng.choice(["rare", "often", "bursts", "flood"]) for name in starts_s}
    for second in range(600):
        for name, kind in kinds.items():
            chance = {"rare": 0.01, "often": 0.2, "bursts": second // 60 % 2, "flood": 1.0}[kind]
            if rng.random() < chance and len(fleet.waiting[name]) < 200:
                fleet.ask(name, rng.expovariate(0.5))
        fleet.step()
    most_s = max(MAX_WAIT_S, sum(starts_s.values()) / num_workers / MAX_LOSS) if of_many else MAX_WAIT_S
    assert fleet.longest_ms <= 1000 * (most_s + max(starts_s.values())) + TICK_MS


@pytest.mark.parametrize("num_bases", [5, 10])
def test_where_arithmetic_forbids_the_bound_all_bases_still_take_turns(num_bases: int) -> None:
    fleet = Fleet(dict.fromkeys("abcdefghij"[:num_bases], START_S), 1)
    for _ in range(4000):
        for name, queue in fleet.waiting.items():
            if len(queue) < 20:
                fleet.ask(name, 2.0)
        fleet.step()
    had = sorted(fleet.had_ms.values())
    assert had[0] > 0.6 * had[-1]
    assert sum(had) > 0.75 * fleet.now_ms, "starts take at most about a fifth"


def test_a_tenant_that_floods_one_base_gets_no_more_than_its_share() -> None:
    """Two other tenants also request all that they can get; each has one share."""
    fleet = Fleet(dict.fromkeys("abc", START_S), 1)
    for second in range(3000):
        for name, most in (("a", 500), ("b", 10), ("c", 10)):
            if len(fleet.waiting[name]) < most:
                fleet.ask(name, 2.0)
        fleet.step()
        if second == 300:
            fleet.had_ms = dict.fromkeys("abc", 0.0)
    assert fleet.had_ms["a"] <= 1.2 * sum(fleet.had_ms.values()) / 3


def test_a_flood_beside_quiet_bases_leaves_them_what_they_ask_for() -> None:
    fleet, rng = Fleet(dict.fromkeys("abc", START_S), 1), random.Random(1)
    asked_s = 0.0
    for _ in range(3000):
        if len(fleet.waiting["a"]) < 200:
            fleet.ask("a", 2.0)
        if rng.random() < 0.05:
            asked_s += 1.0
            fleet.ask(rng.choice("bc"), 1.0)
        fleet.step()
    assert (fleet.had_ms["b"] + fleet.had_ms["c"]) / 1000 > 0.95 * asked_s
    assert fleet.had_ms["a"] > 0.4 * fleet.now_ms, "and gets what they leave"


@pytest.mark.parametrize(("num_bases", "num_workers"), [(2, 2), (3, 4), (3, 16), (10, 16)])
def test_no_swap_once_all_have_a_worker_and_loads_are_steady(num_bases: int, num_workers: int) -> None:
    fleet = Fleet(dict.fromkeys("abcdefghij"[:num_bases], START_S), num_workers)
    for second in range(2000):
        for name in fleet.waiting:
            if second % 4 == 0:
                fleet.ask(name, 2.0)
        fleet.step()
    assert fleet.swaps == []


def test_a_worker_does_not_go_back_and_forth() -> None:
    """Two bases with much work each on one worker: each swap is followed by a turn that is worth its start."""
    fleet = Fleet(dict.fromkeys("ab", START_S), 1)
    for _ in range(2000):
        for name, queue in fleet.waiting.items():
            if len(queue) < 50:
                fleet.ask(name, 2.0)
        fleet.step()
    at_ms = [one[0] for one in fleet.swaps]
    assert len(at_ms) > 20
    assert all(after - before >= 1000 * 5 * START_S for before, after in pairwise(at_ms))
