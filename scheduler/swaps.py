"""Decides which worker switches to which base if a fleet has fewer workers than bases with work. Pure.

During a swap the worker is idle for the seconds of a start, so bases take turns that are as long as the wait bound
allows. Waiting here means waiting *for a base*: the time during which requests for it wait and it has no worker. The
turns are those of a polling system with time limits (Takagi, "Queueing analysis of polling models", ACM Computing
Surveys 20, 1988); the bound is kept by earliest deadline first (Liu and Layland, 1973).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

TURN_STARTS = 4.0
"""Minimum turn of a base that is beyond its share, in starts, so that starts cost the other bases little."""

USED_MS = 300_000.0
"""Time constant in ms of the mean use of machine time, which is compared with shares."""

MARGIN = 1.1
"""Multiple of its share from which a base is beyond it: in turn, equal bases are a little above and below theirs."""

SPARE_STARTS, HELP_STARTS = 0.1, 2.0
"""Waiting work of a base, in starts for each of its workers: above the first, one of several idle workers of another
base helps; above the second, others do."""

LOSS, MAX_LOSS = 0.2, 0.1
"""Fraction of machine time that starts take where the bound is longer than configured: the first if the bound cannot be
kept, the second, at least, if most tenants have much work."""

TICK_MS = 1000.0
"""Maximum ms between two decisions, which the bound takes into account."""

LOST_STARTS, LOST_MS = 3.0, 10_000.0
"""Starts plus ms after which an order without result counts as lost, and the base gets another worker."""


@dataclass(slots=True)
class BaseDemand:
    """The demand for one base. Times in ms are unix time."""

    name: str
    start_s: float  # seconds that a swap to it takes
    shares: float = 0.0  # sum of its tenants' shares; a tenant's share is divided among the bases that it uses now
    waiting_s: float = 0.0  # waiting work, in seconds of one worker
    oldest_ms: float | None = None  # unix ms since which a request has waited, or was handed back; None: none waits
    typical_s: float = 0.0  # lower median over its tenants of the seconds of waiting work divided by the weight

    def add(self, seconds: float, since_ms: float) -> None:
        """Add work that has waited since a unix time in ms."""
        self.waiting_s += seconds
        self.oldest_ms = since_ms if self.oldest_ms is None else min(self.oldest_ms, since_ms)


@dataclass(frozen=True, slots=True)
class Seat:
    """One live worker that may get requests."""

    wid: str
    base: str
    since_ms: float  # unix ms when it joined
    running: int  # number of its requests
    may_become: frozenset[str]
    name: str = ""  # a swap does not change it, unlike the `wid`


@dataclass(frozen=True, slots=True)
class Swap:
    """An order that a worker switch to another base."""

    seat: Seat  # the worker before the swap
    base: str
    why: str  # idle: its base has no work; turn: its turn is over; bound: another would wait too long; load: it helps
    at_ms: float


class SwapPolicy:
    """Decides about swaps. Remembers how much of the workers each base has used."""

    def __init__(self, max_wait_s: float, min_residency_s: float) -> None:
        """max_wait_s: bound on waiting for a base. min_residency_s: how long a worker keeps a base that has work."""
        self.max_wait_ms = 1000 * max_wait_s
        self.residency_ms = 1000 * min_residency_s
        self.served_ms: dict[str, float] = {}  # base -> unix ms when it last had a worker
        self.used: dict[str, float] = {}  # base -> mean fraction of machine time that it has used
        self.busy_ms: dict[str, float] = {}  # worker -> unix ms when it or its base last had work
        self._last_ms = 0.0

    def decide(
        self, now_ms: float, demands: Sequence[BaseDemand], seats: Sequence[Seat], orders: Iterable[Swap] = ()
    ) -> list[Swap]:
        """Return the swaps to order now. Must be called about once a second, with all workers of these bases.

        demands: of all bases, except those that failed to start and must not be tried yet. orders: pending orders,
        without a result yet.
        """
        fleet = _Fleet(self, now_ms, {demand.name: demand for demand in demands}, seats, orders)
        self._observe_use(now_ms, fleet)
        return fleet.decide()

    def _observe_use(self, now_ms: float, fleet: _Fleet) -> None:
        keeps = math.exp(min(0.0, self._last_ms - now_ms) / USED_MS)
        self._last_ms = now_ms
        self.used = {
            name: keeps * self.used.get(name, 0.0) + (1 - keeps) * fleet.num[name] / max(1, fleet.num.total())
            for name in fleet.demands
        }
        self.served_ms = {name: ms for name, ms in self.served_ms.items() if name in fleet.demands}
        self.served_ms.update((seat.base, now_ms) for seat in fleet.free)
        self.busy_ms = {
            seat.wid: self.busy_ms.get(seat.wid, now_ms) if fleet.is_idle(seat) else now_ms for seat in fleet.free
        }


class _Fleet:
    """The fleet at one moment, and the decisions for it."""

    def __init__(
        self,
        policy: SwapPolicy,
        now_ms: float,
        demands: Mapping[str, BaseDemand],
        seats: Sequence[Seat],
        orders: Iterable[Swap],
    ) -> None:
        self._policy, self._now_ms, self.demands = policy, now_ms, demands
        self.free = list(seats)
        """Workers that may get an order."""
        orders = [order for order in orders if self._may_come(order)]
        self.num = Counter([*(seat.base for seat in self.free), *(order.base for order in orders)])
        """Number of workers that each base has or will have."""
        self._num_workers = max(1, self.num.total())
        self._joins_ms = [order.at_ms + 1000 * demands[order.base].start_s for order in orders]
        self._since_ms = {demand.name: demand.oldest_ms for demand in demands.values() if demand.oldest_ms is not None}
        running = {seat.base for seat in self.free if seat.running}
        self._active = [one for name, one in demands.items() if name in running or name in self._since_ms]
        self._shares = sum(demand.shares for demand in self._active) or 1.0
        self._starts_ms = sum(1000 * demand.start_s for demand in self._active)
        self._swaps: list[Swap] = []

    def _may_come(self, order: Swap) -> bool:
        """Return whether the worker of an order may still arrive at its base."""
        demand = self.demands.get(order.base)
        return demand is not None and self._now_ms < order.at_ms + LOST_STARTS * 1000 * demand.start_s + LOST_MS

    def is_idle(self, seat: Seat) -> bool:
        """Return whether neither a worker nor its base has work."""
        return not seat.running and seat.base not in self._since_ms

    def decide(self) -> list[Swap]:
        """Assign workers to bases that wait for one, the most urgent first; then move some to busy bases."""
        due_ms = self._due_ms()
        unserved = sorted(due_ms, key=due_ms.__getitem__)
        leaving = [(seat, why) for seat in self.free if (why := self._why(seat))]
        for i, name in enumerate(unserved):
            may = [one for one in leaving if name in one[0].may_become]
            if may and (any(why != "bound" for _, why in may) or self._must_leave(may, unserved[i:], due_ms)):
                leaver = max(may, key=lambda one: (one[1] != "bound", self._excess(one[0])))
                leaving.remove(leaver)
                self._order(*leaver, name)
        if all(self.num[name] for name in due_ms):
            self._help()
        return self._swaps

    def _due_ms(self, all_s: float = 0.0) -> dict[str, float]:
        """Return the unix ms until which each base without a worker may wait.

        all_s: typical work of the fleet's tenants in s, used for bases with less of their own.
        """
        found: dict[str, float] = {}
        for name, since_ms in self._since_ms.items():
            if not self.num[name]:
                own_s = self.demands[name].typical_s if self._is_beyond_share(self.demands[name]) else 0.0
                since_ms = max(since_ms, self._policy.served_ms.get(name, since_ms))
                found[name] = since_ms + self._limit_ms(max(own_s, all_s))
        return found

    def _limit_ms(self, typical_s: float) -> float:
        """Return the maximum ms of waiting where the work of a typical tenant takes `typical_s`.

        This is the bound, or longer in two cases: if so many bases cannot take turns within it, or if a typical tenant
        has more work than its part of a turn within the bound, because longer turns finish that sooner.
        """
        num, starts_ms, least_ms = self._num_workers, self._starts_ms, self._policy.max_wait_ms
        if num * least_ms < starts_ms + len(self._active) * self._policy.residency_ms:
            least_ms = max(least_ms, starts_ms / num / LOSS)
        part_ms = (num * least_ms - starts_ms) / self._shares
        most_ms = starts_ms / num / MAX_LOSS
        return max(least_ms, min(most_ms, least_ms * 1000 * typical_s / max(part_ms, 1.0)))

    def _typical_s(self) -> float:
        """Return the lower median of `BaseDemand.typical_s`, weighted by the shares of the bases."""
        shares = 0.0
        for demand in sorted(self._active, key=lambda one: one.typical_s):
            shares += demand.shares
            if 2 * shares >= self._shares:
                return demand.typical_s
        return 0.0

    def _must_leave(
        self, leaving: Iterable[tuple[Seat, str]], unserved: Iterable[str], due_ms: Mapping[str, float]
    ) -> bool:
        """Return whether one of the workers must leave now so that no base waits too long.

        Others wait longer for a worker of a base that is within its share, if bases with half of all shares have much
        work of most of their tenants.
        """
        if not self._is_late(unserved, due_ms):
            return False
        is_beyond = any(self._is_beyond_share(self.demands[seat.base]) for seat, _ in leaving)
        return is_beyond or self._is_late(unserved, self._due_ms(self._typical_s()))

    def _is_late(self, unserved: Iterable[str], due_ms: Mapping[str, float]) -> bool:
        """Return whether some base would wait too long if no worker left its base before the next decision.

        Counts the time of all workers together: first the rest of their minimum residencies, then a start and a
        residency for each unserved base.
        """
        soon_ms, residency_ms = self._now_ms + TICK_MS, self._policy.residency_ms
        joined_ms = [*(seat.since_ms for seat in self.free), *self._joins_ms]
        taken_ms = sum(max(0.0, since_ms + residency_ms - soon_ms) for since_ms in joined_ms)
        for name in unserved:
            if soon_ms + taken_ms / self._num_workers > due_ms[name]:
                return True
            taken_ms += 1000 * self.demands[name].start_s + residency_ms
        return False

    def _why(self, seat: Seat) -> str:
        """Return why a worker may leave for a base without a worker, "" if it stays."""
        if self.is_idle(seat):
            return "idle"
        long_ms = self.num[seat.base] * self._policy.max_wait_ms
        if self._has_had_turn(seat) and 1000 * self.demands[seat.base].waiting_s > long_ms:
            return "turn"
        return "bound" if self._now_ms - seat.since_ms >= self._policy.residency_ms else ""

    def _has_had_turn(self, seat: Seat) -> bool:
        """Return whether a worker's base is beyond its share and the worker has served it for a turn."""
        demand = self.demands[seat.base]
        turn_ms = max(self._policy.residency_ms, TURN_STARTS * 1000 * demand.start_s)
        return self._now_ms - seat.since_ms >= turn_ms and self._is_beyond_share(demand)

    def _is_beyond_share(self, demand: BaseDemand) -> bool:
        """Return whether a base has recently used more machine time than its tenants' shares, by `MARGIN`."""
        return self._policy.used.get(demand.name, 0.0) > MARGIN * demand.shares / self._shares

    def _ideal(self, name: str) -> float:
        """Return the number of workers that is a base's share."""
        return self._num_workers * self.demands[name].shares / self._shares

    def _excess(self, seat: Seat) -> tuple[bool, float, float]:
        """Return a sort key of workers: idle ones, then the excess of the base over its share, then its lack of use."""
        return self.is_idle(seat), self.num[seat.base] - self._ideal(seat.base), -self._policy.used.get(seat.base, 0.0)

    def _help(self) -> None:
        """Move workers to bases whose own workers need long for the waiting work."""
        idle = Counter(seat.base for seat in self.free if self.is_idle(seat))
        for demand in sorted(self._active, key=lambda one: -one.waiting_s):
            while may := self._helpers(demand, idle):
                self._order(helper := max(may, key=self._excess), "load", demand.name)
                idle[helper.base] -= self.is_idle(helper)

    def _helpers(self, demand: BaseDemand, idle: Mapping[str, int]) -> list[Seat]:
        """Return the workers that may help a base now. idle: number of idle workers of each base.

        If less waits than `HELP_STARTS`, spare ones come one at a time; starts take at most `MAX_LOSS` of their time.
        """
        num, seats = self.num[demand.name], self.free
        if not demand.waiting_s > SPARE_STARTS * num * demand.start_s > 0:
            return []
        if demand.waiting_s <= HELP_STARTS * num * demand.start_s:
            if num > sum(seat.base == demand.name for seat in seats):
                return []
            since_ms = self._now_ms - 1000 * demand.start_s / MAX_LOSS
            seats = [s for s in seats if idle[s.base] > 1 and not s.running and s.since_ms <= since_ms]
        return [seat for seat in seats if self._may_help(seat, demand)]

    def _may_help(self, seat: Seat, demand: BaseDemand) -> bool:
        """Return whether a worker may help a base with much waiting work.

        An idle one may, the last of its base only once it has been idle for the time of a start. So may one of a base
        with at least one worker more than its share, if the other has less than its.
        """
        num = self.num[seat.base]
        if demand.name == seat.base or demand.name not in seat.may_become:
            return False
        if self.is_idle(seat):
            return num > 1 or self._now_ms - self._policy.busy_ms[seat.wid] >= 1000 * demand.start_s
        is_extra = num > 1 and num - 1 >= self._ideal(seat.base) and self._has_had_turn(seat)
        return is_extra and self.num[demand.name] < self._ideal(demand.name)

    def _order(self, seat: Seat, why: str, name: str) -> None:
        self._swaps.append(Swap(seat, name, why, self._now_ms))
        self.free.remove(seat)
        self._joins_ms.append(self._now_ms + 1000 * self.demands[name].start_s)
        self.num[seat.base] -= 1
        self.num[name] += 1
