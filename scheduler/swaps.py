"""Which worker becomes which base, where a fleet has fewer workers than bases with work. Pure.

A swap costs the seconds of a start, in which the worker does nothing, so bases take turns as long as the bound on
waiting allows. Waiting here is waiting *for a base*: the time in which requests for it wait and it has no worker. The
turns are those of a polling system with time limits (Takagi, "Queueing analysis of polling models", ACM Computing
Surveys 20, 1988); the bound is kept by earliest deadline first (Liu and Layland, 1973).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

TURN_STARTS = 10.0
"""A turn lasts at least so many times its start where the bound allows it, so that starts cost a tenth."""

HELP_STARTS = 2.0
"""Work that waits at a base, in seconds for each of its workers and in starts, from which one more worker helps."""

TICK_MS = 1000.0
"""Time between two decisions at most, which the bound takes into account."""

LOST_STARTS, LOST_MS = 3.0, 10_000.0
"""An order counts as lost if nothing has come of it in so many starts and ms more."""


@dataclass(frozen=True, slots=True)
class BaseDemand:
    """What is asked of one base. Times in ms are unix time."""

    name: str
    shares: float
    """Sum of the shares of tenants that use it; a tenant's is divided among the bases that it uses now."""
    waiting_s: float
    """Work that waits, in seconds of one worker."""
    oldest_ms: float | None
    """Since when the request waits that has waited longest, counted anew when it is handed back; None: none waits."""
    start_s: float
    """What a swap to it takes."""
    blocked_until_ms: float = 0.0
    """It failed to start, and is not tried again before."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker that lives and may get requests, or has been ordered away."""

    wid: str
    base: str
    since_ms: float
    """When it joined, unix time."""
    running: int
    """Requests that it has."""
    may_become: frozenset[str]
    becoming: str = ""
    """The base that it was ordered to become."""
    name: str = ""
    """What it is called after the swap too, when it has another `wid`; "": its `wid`."""


@dataclass(frozen=True, slots=True)
class Swap:
    """An order: a worker becomes another base."""

    wid: str
    base: str
    why: str
    """idle: its base had nothing to do; turn: its turn was over; bound: others would wait too long; load: it helps."""


@dataclass(slots=True)
class _Order:
    """A swap on its way: until the worker joins again under another id, or until it counts as lost."""

    wid: str
    base: str
    joins_ms: float
    until_ms: float


class SwapPolicy:
    """Decides about swaps. It remembers orders on their way, and when each base last had a worker.

    After a change of the leader it has forgotten both. It then learns the orders from `Seat.becoming`, and may order
    one swap too many for a base whose worker is just restarting.
    """

    def __init__(self, max_wait_s: float, min_residency_s: float) -> None:
        """Take the bound on waiting for a base, and the time for which a worker keeps a base that has work."""
        self.max_wait_ms = 1000 * max_wait_s
        self.residency_ms = 1000 * min_residency_s
        self._orders: dict[str, _Order] = {}  # by the name of the worker
        self._served_ms: dict[str, float] = {}  # base -> when it last had a worker
        self._busy_ms: dict[str, float] = {}  # worker -> when it or its base last had work

    def decide(self, now_ms: float, demands: Sequence[BaseDemand], seats: Sequence[Seat]) -> list[Swap]:
        """Return the swaps to order now. To be called about once a second, with all bases and all workers."""
        by_name = {demand.name: demand for demand in demands}
        self._observe_orders(now_ms, by_name, seats)
        orders = [order for order in self._orders.values() if order.until_ms > now_ms]
        gone = {order.wid for order in orders}
        free = [seat for seat in seats if seat.wid not in gone]
        waits = {demand.name for demand in demands if demand.oldest_ms is not None}
        self._served_ms = {name: ms for name, ms in self._served_ms.items() if name in by_name}
        self._served_ms.update((seat.base, now_ms) for seat in free)
        self._busy_ms = {
            seat.wid: now_ms if seat.running or seat.base in waits else self._busy_ms.get(seat.wid, now_ms)
            for seat in free
        }
        view = _View(self, now_ms, by_name, free, orders, self._served_ms, self._busy_ms)
        swaps = view.decide()
        names = {seat.wid: seat.name or seat.wid for seat in seats}
        for swap in swaps:
            start_ms = 1000 * by_name[swap.base].start_s
            until_ms = now_ms + LOST_STARTS * start_ms + LOST_MS
            self._orders[names[swap.wid]] = _Order(swap.wid, swap.base, now_ms + start_ms, until_ms)
        return swaps

    def _observe_orders(self, now_ms: float, demands: Mapping[str, BaseDemand], seats: Sequence[Seat]) -> None:
        """Forget orders that came to something or to nothing; learn those of an earlier leader."""
        by_name = {seat.name or seat.wid: seat for seat in seats}
        for name, order in list(self._orders.items()):
            seat, demand = by_name.get(name), demands.get(order.base)
            is_over = seat is None and order.until_ms <= now_ms
            if is_over or (seat is not None and seat.wid != order.wid):
                del self._orders[name]
            elif demand is None or demand.blocked_until_ms > now_ms:
                order.until_ms = now_ms
        for name, seat in by_name.items():
            if seat.becoming in demands and name not in self._orders:
                start_ms = 1000 * demands[seat.becoming].start_s
                until_ms = now_ms + LOST_STARTS * start_ms + LOST_MS
                self._orders[name] = _Order(seat.wid, seat.becoming, now_ms + start_ms, until_ms)


class _View:
    """The fleet at one moment, and what is decided about it."""

    def __init__(
        self, policy: SwapPolicy, now_ms: float, demands: Mapping[str, BaseDemand], free: list[Seat],
        orders: Sequence[_Order], served_ms: Mapping[str, float], busy_ms: Mapping[str, float],
    ) -> None:  # fmt: skip
        self._max_wait_ms, self._residency_ms = policy.max_wait_ms, policy.residency_ms
        self._now_ms, self._demands, self._free = now_ms, demands, free
        self._busy_ms = busy_ms
        self._num = Counter([*(seat.base for seat in free), *(order.base for order in orders)])
        self._num_workers = len(free) + len(orders)
        self._joins_ms = [order.joins_ms for order in orders]
        self._waiting = {d.name: d.oldest_ms for d in demands.values() if d.oldest_ms is not None}
        self._due_ms = {
            name: max(ms, served_ms.get(name, ms)) + self._max_wait_ms for name, ms in self._waiting.items()
        }
        active = self._waiting.keys() | {seat.base for seat in free if seat.running}
        self._active = [demand for demand in demands.values() if demand.name in active]
        self._shares = sum(demand.shares for demand in self._active) or 1.0
        self._swaps: list[Swap] = []

    def decide(self) -> list[Swap]:
        """Give a worker to bases that wait for one, the most urgent first; else move workers to where work piles up."""
        unserved = sorted(
            (d for d in self._active if d.name in self._due_ms and not self._num[d.name] and self._is_open(d)),
            key=lambda demand: self._due_ms[demand.name],
        )
        for num, demand in enumerate(unserved):
            is_late = self._is_late(unserved[num:])
            leaving = [(seat, why) for seat in self._free if (why := self._why(seat, demand, is_late=is_late))]
            if leaving:
                self._order(*max(leaving, key=lambda one: self._excess(one[0])), demand)
        if all(self._num[demand.name] for demand in unserved):
            self._help()
        return self._swaps

    def _is_open(self, demand: BaseDemand) -> bool:
        return demand.blocked_until_ms <= self._now_ms

    def _is_late(self, unserved: Sequence[BaseDemand]) -> bool:
        """Return whether some base would wait too long if no worker left one before the next decision."""
        leaves_ms = [max(self._now_ms + TICK_MS, seat.since_ms + self._residency_ms) for seat in self._free]
        leaves_ms += [max(self._now_ms + TICK_MS, joins_ms + self._residency_ms) for joins_ms in self._joins_ms]
        heapify(leaves_ms)
        for demand in unserved:
            if leaves_ms[0] > self._due_ms[demand.name]:
                return True
            heapreplace(leaves_ms, leaves_ms[0] + 1000 * demand.start_s + self._residency_ms)
        return False

    def _why(self, seat: Seat, demand: BaseDemand, *, is_late: bool) -> str:
        """Return why a worker leaves its base for one without a worker, "" if it stays."""
        if demand.name not in seat.may_become:
            return ""
        if not seat.running and seat.base not in self._waiting:
            return "idle"
        stayed_ms = self._now_ms - seat.since_ms
        if stayed_ms >= self._turn_ms(seat.base):
            return "turn"
        return "bound" if is_late and stayed_ms >= self._residency_ms else ""

    def _turn_ms(self, name: str) -> float:
        """Return for how long a base keeps a worker while it has work and others wait for one."""
        demand = self._demands.get(name)
        if demand is None:
            return self._residency_ms
        share = demand.shares / self._shares
        long_ms = TURN_STARTS * 1000 * demand.start_s * share * len(self._active)
        visits_ms = sum(1000 * one.start_s + self._residency_ms for one in self._active)
        spare_ms = self._num_workers * self._max_wait_ms - visits_ms
        if spare_ms < 0:
            return max(self._residency_ms, 0.4 * long_ms)
        return max(self._residency_ms, min(long_ms, self._residency_ms + spare_ms * share))

    def _ideal(self, name: str) -> float:
        demand = self._demands.get(name)
        return self._num_workers * demand.shares / self._shares if demand is not None else 0.0

    def _excess(self, seat: Seat) -> tuple[bool, float, float]:
        """Order workers by what their base has beyond its share."""
        is_idle = not seat.running and seat.base not in self._waiting
        return is_idle, self._num[seat.base] - self._ideal(seat.base), -seat.since_ms

    def _help(self) -> None:
        """Move workers to bases whose own need longer than a few starts for what waits."""
        for demand in sorted(self._active, key=lambda one: -one.waiting_s):
            while self._is_open(demand) and (num := self._num[demand.name]):
                if demand.waiting_s <= num * HELP_STARTS * demand.start_s:
                    break
                helpers = [seat for seat in self._free if self._may_help(seat, demand)]
                if not helpers:
                    break
                self._order(max(helpers, key=self._excess), "load", demand)

    def _may_help(self, seat: Seat, demand: BaseDemand) -> bool:
        if seat.base == demand.name or demand.name not in seat.may_become:
            return False
        is_last = self._num[seat.base] == 1
        if not seat.running and seat.base not in self._waiting:
            idle_ms = self._now_ms - self._busy_ms[seat.wid]
            return not is_last or idle_ms >= HELP_STARTS * 1000 * demand.start_s
        if is_last or self._now_ms - seat.since_ms < self._turn_ms(seat.base):
            return False
        return self._num[seat.base] - 1 >= self._ideal(seat.base) and self._num[demand.name] < self._ideal(demand.name)

    def _order(self, seat: Seat, why: str, demand: BaseDemand) -> None:
        self._swaps.append(Swap(seat.wid, demand.name, why))
        self._free.remove(seat)
        self._joins_ms.append(self._now_ms + 1000 * demand.start_s)
        self._num[seat.base] -= 1
        self._num[demand.name] += 1
