"""A day with more or fewer bases than workers: the scheduler's swaps compared with FIFO and with collation.

`python -m benchmarks.simulation.swapping`. It runs the scheduler's swap policy in virtual time, seeded, so every run
gives the same numbers. A worker serves up to `--slots` requests in one batch, each for some seconds, and a swap takes 2
to 4 s, depending on the base. *fifo*: requests start in the order of their arrival; if the oldest is for another base,
a worker that has ended its requests swaps. *collate*: a worker serves its base until nothing waits for that base, ends
its requests, and swaps to the base of the oldest request. *swaps*: `scheduler.swaps`, called twice a second. A request
that a swap interrupts waits for its base again, and then continues where it was, after a fraction of a second.

Waiting is all time between a request's arrival and its end in which it was not in a batch. The flooding tenant does not
count.
"""

from __future__ import annotations

import json
import math
import random
from bisect import bisect
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from heapq import heappop, heappush
from itertools import accumulate, islice, product
from typing import Any

from benchmarks.common import report
from scheduler.swaps import BaseDemand, Seat, Swap, SwapPolicy

POLICIES = ("fifo", "collate", "swaps")
LOADS = ("steady", "day", "flood")
TICK_S = 0.5
RESUME_S = 0.2
"""Seconds that a request costs in addition to its work after each hand-over."""

SHORT_S = 1e-6
"""Remaining work in s that counts as none, because times are rounded."""

MEAN_WORK_S = 2.0
STEP_GROWTH = 0.07
"""Additional time of a step for each further request in its batch, as a fraction of a step with one: measured with
SmolLM2-135M (docs/measured/peers.md; 133, 704 and 1,347 tok/s with 1, 8 and 32 streams).
"""

MAX_WAIT_S, MIN_RESIDENCY_S = 30.0, 5.0
NUM_TENANTS = 3
"""Mean number of tenants per base; a popular base has more."""

FLOOD = "flood"
FLOOD_OPEN = 20
"""Number of open requests per worker and slot that the flooding tenant always has."""


def slowdown(num: int) -> float:
    """Return how many times as long a request takes in a batch of `num` requests as alone."""
    return 1.0 + STEP_GROWTH * (max(1, num) - 1)


@dataclass(slots=True)
class Request:
    """One request: its remaining and its total work in seconds of a worker that serves it alone. Times are in s."""

    at_s: float
    base: str
    tenant: str
    left_s: float
    work_s: float
    since_s: float = 0.0  # waits since, while it waits
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Cell:
    """A simulated case.

    load: mean fraction of the workers' throughput with full batches that the requests use, without the flood's. slots:
    maximum requests in a worker's batch.
    """

    bases: int
    workers: int
    kind: str
    load: float
    hours: float = 24.0
    seed: int = 0
    slots: int = 1

    @property
    def speed(self) -> float:
        """The work that a worker does per second with a full batch."""
        return self.slots / slowdown(self.slots)

    @property
    def names(self) -> list[str]:
        """The names of the bases, the most popular one first."""
        return [f"b{i}" for i in range(self.bases)]

    def start_s(self, base: str) -> float:
        """Return the seconds of a swap to a base: 2 to 4."""
        return 2.0 + 2.0 * ((int(base[1:]) * 7) % 10) / 9


def arrivals(cell: Cell) -> Iterator[Request]:
    """Yield the requests of a day, Zipf-distributed over the bases, ordered by time.

    day: each base has its peak, 1.6 times its mean, at its own hour, and for five minutes of each hour one base is
    three times as popular. flood: the last base belongs to the flooding tenant, whose requests are not yielded here.
    """
    rng = random.Random(f"{cell.kind} {cell.seed}")
    names = cell.names[:-1] if cell.kind == "flood" else cell.names
    zipf = [1 / (i + 1) for i in range(len(names))]
    total = sum(zipf)
    num_tenants = [max(1, round(NUM_TENANTS * len(names) * one / total)) for one in zipf]
    rate = cell.load * cell.workers * cell.speed / MEAN_WORK_S
    phases = [rng.random() for _ in names]
    bursts = [rng.randrange(len(names)) for _ in range(math.ceil(cell.hours))]
    at_s, end_s = 0.0, 3600 * cell.hours
    while True:
        at_s += rng.expovariate(3 * rate)  # thinned below
        if at_s >= end_s:
            return
        weights = list(zipf)
        if cell.kind == "day":
            weights = [
                w * (1 + 0.6 * math.sin(2 * math.pi * (at_s / end_s + p))) for w, p in zip(zipf, phases, strict=True)
            ]
            if at_s % 3600 < 300:
                weights[bursts[int(at_s // 3600)]] *= 3
        if rng.random() * 3 * total > sum(weights):
            continue
        sums = list(accumulate(weights))
        base = bisect(sums, rng.random() * sums[-1])
        work_s = rng.expovariate(1 / MEAN_WORK_S)
        yield Request(at_s, names[base], f"{names[base]} {rng.randrange(num_tenants[base])}", work_s, work_s)


@dataclass(slots=True)
class Worker:
    """One worker. It serves its batch, or is starting as `base` until `ready_s`."""

    wid: str
    base: str
    since_s: float = 0.0
    ready_s: float = 0.0
    batch: list[Request] = field(default_factory=list[Request])
    at_s: float = 0.0  # when `left_s` of its batch was last reduced
    serial: int = 0  # of its last event; earlier events are void
    is_draining: bool = False  # ends its batch and then swaps
    order: Swap | None = None  # the last swap order

    def advance(self, now_s: float) -> None:
        """Reduce the remaining work of the batch by what has been done until now."""
        done_s = max(0.0, now_s - max(self.at_s, self.ready_s)) / slowdown(len(self.batch))
        for request in self.batch:
            request.left_s -= done_s
        self.at_s = now_s

    def next_end_s(self) -> float:
        """Return when the next request of the batch ends if the batch does not change. It must not be empty."""
        left_s = max(0.0, min(request.left_s for request in self.batch))
        return max(self.at_s, self.ready_s) + left_s * slowdown(len(self.batch))


@dataclass(slots=True)
class Outcome:
    """The result of a day. Times are in s."""

    waits_s: list[float] = field(default_factory=list[float])
    swaps: Counter[str] = field(default_factory=Counter[str])
    served_s: dict[str, float] = field(
        default_factory=lambda: defaultdict[str, float](float)
    )  # work of ended requests, by tenant, in s of a worker that serves one at a time
    num_ended: int = 0  # within the day, without the flood's
    starting_s: float = 0.0
    longest_s: float = 0.0  # maximum time without a worker of a base with requests

    def wait_s(self, percentile: float) -> float:
        """Return a percentile of the waits in s."""
        waits = sorted(self.waits_s)
        return waits[min(len(waits) - 1, int(percentile * len(waits)))] if waits else 0.0


class Day:
    """One day under one policy."""

    def __init__(self, cell: Cell, policy: str) -> None:
        self._cell, self._policy = cell, policy
        self._swaps = SwapPolicy(MAX_WAIT_S, MIN_RESIDENCY_S)
        names = cell.names
        self._workers = [Worker(f"w{i}", names[i % len(names)]) for i in range(cell.workers)]
        self._queues = {name: deque[Request]() for name in names}
        self._waiting_s = dict.fromkeys(names, 0.0)
        self._num_open = {name: Counter[str]() for name in names}  # by tenant
        self._events: list[tuple[float, int, Worker | None, int]] = []
        self._num_events = 0
        self._unserved_s = dict.fromkeys(names, math.inf)
        self._rng = random.Random(f"flood {cell.seed}")
        self.outcome = Outcome()

    def run(self, coming: Iterator[Request]) -> Outcome:
        """Play the day, and serve every request that arrived until it ends."""
        cell = self._cell
        end_s = 3600 * cell.hours
        if cell.kind == "flood":
            for _ in range(FLOOD_OPEN * cell.workers * cell.slots):
                self._flood(0.0)
        arrival = next(coming, None)
        self._push(TICK_S, None)
        while self._events:
            now_s = self._events[0][0]
            if arrival is not None and arrival.at_s <= now_s:
                self._arrive(arrival, arrival.at_s)
                arrival = next(coming, None)
                continue
            _, _, worker, serial = heappop(self._events)
            if worker is None:
                if now_s >= end_s and not any(self._num_open[name] for name in cell.names):
                    break
                self._tick(now_s)
                self._push(now_s + TICK_S, None)
            elif worker.serial == serial:
                worker.advance(now_s)
                self._end(worker, now_s, end_s)
                self._assign(now_s)
        return self.outcome

    def _push(self, at_s: float, worker: Worker | None) -> None:
        self._num_events += 1
        if worker is not None:
            worker.serial = self._num_events
        heappush(self._events, (at_s, self._num_events, worker, self._num_events))

    def _flood(self, now_s: float) -> None:
        if now_s < 3600 * self._cell.hours:
            work_s = self._rng.expovariate(1 / MEAN_WORK_S)
            self._arrive(Request(now_s, self._cell.names[-1], FLOOD, work_s, work_s), now_s)

    def _arrive(self, request: Request, now_s: float) -> None:
        self._num_open[request.base][request.tenant] += 1
        self._wait(request, now_s)
        self._assign(now_s)

    def _wait(self, request: Request, now_s: float, *, first: bool = False) -> None:
        request.since_s = now_s
        queue = self._queues[request.base]
        (queue.appendleft if first else queue.append)(request)
        self._waiting_s[request.base] += request.left_s

    def _assign(self, now_s: float) -> None:
        """Put waiting requests into batches as far as the policy allows it, those of the oldest base first."""
        stuck = set[str]()
        while heads := [
            (queue[0].since_s, name) for name, queue in self._queues.items() if queue and name not in stuck
        ]:
            base = min(heads)[1]
            if (worker := self._worker_for(base, now_s)) is not None:
                self._begin(worker, base, now_s)
            elif self._policy == "fifo":
                return
            else:
                stuck.add(base)
        if self._policy == "collate":
            self._drain(len(stuck))

    def _drain(self, num: int) -> None:
        """Let as many workers as bases that wait for one end their batches: those for whose bases nothing waits."""
        num -= sum(worker.is_draining for worker in self._workers)
        may = [
            worker
            for worker in self._workers
            if 0 < len(worker.batch) < self._cell.slots and not self._queues[worker.base] and not worker.is_draining
        ]
        for worker in sorted(may, key=lambda one: max(request.left_s for request in one.batch))[: max(0, num)]:
            worker.is_draining = True

    def _worker_for(self, base: str, now_s: float) -> Worker | None:
        """Return the worker that takes the next request for a base; it must swap only if the policy allows it."""
        can_swap = self._policy != "swaps"
        own = [
            worker
            for worker in self._workers
            if worker.base == base
            and len(worker.batch) < self._cell.slots
            and not worker.is_draining
            and (can_swap or worker.ready_s <= now_s)
        ]
        if own:
            return min(own, key=lambda one: (one.ready_s > now_s, len(one.batch)))
        idle = [worker for worker in self._workers if not worker.batch and worker.ready_s <= now_s]
        if self._policy == "collate":
            idle = [worker for worker in idle if worker.is_draining or not self._queues[worker.base]]
        return min(idle, key=lambda one: one.since_s) if idle and can_swap else None

    def _begin(self, worker: Worker, base: str, now_s: float) -> None:
        """Put the next request for a base into a worker's batch, after a swap if the worker has another base."""
        if base != worker.base:
            self._swap(worker, base, "", now_s)
        worker.advance(now_s)
        request = self._queues[base].popleft()
        self._waiting_s[base] -= request.left_s
        request.waited_s += max(now_s, worker.ready_s) - request.since_s
        worker.batch.append(request)
        self._push(worker.next_end_s(), worker)

    def _swap(self, worker: Worker, base: str, why: str, now_s: float) -> None:
        start_s = self._cell.start_s(base)
        self.outcome.swaps[why] += 1
        self.outcome.starting_s += start_s
        worker.is_draining = False
        worker.base, worker.ready_s, worker.since_s = base, now_s + start_s, now_s + start_s

    def _end(self, worker: Worker, now_s: float, end_s: float) -> None:
        """End the requests of a batch that have no work left."""
        ended = [request for request in worker.batch if request.left_s <= SHORT_S]
        worker.batch = [request for request in worker.batch if request.left_s > SHORT_S]
        if worker.batch:
            self._push(worker.next_end_s(), worker)
        for request in ended:
            outcome, tenants = self.outcome, self._num_open[request.base]
            tenants[request.tenant] -= 1
            if not tenants[request.tenant]:
                del tenants[request.tenant]
            if now_s <= end_s:
                outcome.served_s[request.tenant] += request.work_s
            if request.tenant == FLOOD:
                self._flood(now_s)
            else:
                outcome.waits_s.append(request.waited_s)
                outcome.num_ended += now_s <= end_s

    def _tick(self, now_s: float) -> None:
        """Record how long bases had no worker; under the scheduler's policy also request swaps and perform them."""
        served = {worker.base for worker in self._workers if worker.ready_s <= now_s}
        for name, queue in self._queues.items():
            since_s = self._unserved_s[name] = min(self._unserved_s[name], now_s) if queue else math.inf
            if name in served:
                self._unserved_s[name] = math.inf
            elif queue:
                self.outcome.longest_s = max(self.outcome.longest_s, now_s - since_s)
        if self._policy != "swaps":
            return
        demands = [
            BaseDemand(
                name, self._cell.start_s(name), float(len(self._num_open[name])),
                self._waiting_s[name] / self._cell.speed, self._oldest_ms(queue), self._typical_s(name),
            )
            for name, queue in self._queues.items()
        ]  # fmt: skip
        names = frozenset(self._cell.names)
        by_seat = {f"{one.wid} {one.since_s}": one for one in self._workers if one.ready_s <= now_s}
        seats = [Seat(wid, one.base, 1000 * one.since_s, len(one.batch), names) for wid, one in by_seat.items()]
        orders = [one.order for one in self._workers if one.order is not None and one.ready_s > now_s]
        for swap in self._swaps.decide(1000 * now_s, demands, seats, orders):
            worker = by_seat[swap.seat.wid]
            worker.order = swap
            worker.advance(now_s)
            for request in reversed(worker.batch):
                if request.left_s < request.work_s:
                    request.left_s += RESUME_S
                    request.waited_s += RESUME_S
                self._wait(request, now_s, first=True)
            worker.batch = []
            self._swap(worker, swap.base, swap.why, now_s)
            self._push(worker.ready_s, worker)

    def _oldest_ms(self, queue: deque[Request]) -> float | None:
        """Return since when a base's oldest request waits, in ms. Those handed over are first in its queue."""
        first = islice(queue, self._cell.workers * self._cell.slots + 1)
        return min((1000 * request.since_s for request in first), default=None)

    def _typical_s(self, base: str) -> float:
        """Return the median of the tenants' waiting work in s of a full batch; all tenants have equal shares."""
        waiting_s = dict.fromkeys(self._num_open[base], 0.0)
        for request in self._queues[base]:
            waiting_s[request.tenant] += request.left_s
        return sorted(waiting_s.values())[(len(waiting_s) - 1) // 2] / self._cell.speed if waiting_s else 0.0


def row(cell: Cell, policy: str) -> dict[str, Any]:
    """Play a day, and return its reported figures."""
    outcome = Day(cell, policy).run(arrivals(cell))
    seconds = 3600 * cell.hours * cell.workers
    served_s = sum(outcome.served_s.values()) / cell.speed
    unused = 1 - (served_s + outcome.starting_s) / seconds
    return {
        **asdict(cell),
        "policy": policy,
        "p50_s": round(outcome.wait_s(0.5), 2),
        "p99_s": round(outcome.wait_s(0.99), 1),
        "requests_per_h": round(outcome.num_ended / cell.hours),
        "swaps_per_h": round(outcome.swaps.total() / cell.hours, 1),
        "unused": round(max(0.0, unused), 3),
        "flood": round(outcome.served_s[FLOOD] / cell.speed / seconds, 3),
        "longest_s": round(outcome.longest_s, 1),
        "why": dict(sorted(outcome.swaps.items())),
    }


SHOWN = ("p50_s", "p99_s", "requests_per_h", "swaps_per_h", "unused", "longest_s")
HEADINGS = ("bases", "workers", "load", "p50, s", "p99, s", "requests/h", "swaps/h", "unused", "longest, s", "wanted")


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a table row for each cell, given one result for each of `POLICIES`.

    The target is half of FIFO's p99 at no less throughput.
    """
    found: list[list[str]] = []
    for number in range(0, len(rows), len(POLICIES)):
        fifo, _, swaps = cell = rows[number : number + len(POLICIES)]
        most_s = fifo["p99_s"] / 2
        is_reached = swaps["p99_s"] <= most_s and swaps["requests_per_h"] >= 0.99 * fifo["requests_per_h"]
        shown = [" / ".join(f"{one[key]:,}" for one in cell) for key in SHOWN]
        wanted = f"{most_s:,.1f}: {'reached' if is_reached else 'missed'}"
        found.append([swaps["bases"], swaps["workers"], f"{swaps['kind']} {swaps['load']}", *shown, wanted])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Play all days, save their figures, and print the table."""
    parser = report.parser(__doc__, without=("model", "short"))
    parser.add_argument("--bases", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--kinds", nargs="+", choices=LOADS, default=LOADS)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6], help="share of the workers' time")
    parser.add_argument("--slots", type=int, default=8, help="maximum requests in a batch (%(default)s)")
    parser.add_argument("--hours", type=float, default=24.0, help="length of the day (%(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="days played at once (%(default)s)")
    args = parser.parse_args(argv)
    about = report.machine()
    cells = [
        Cell(bases, workers, kind, load, args.hours, args.seed, args.slots)
        for bases, workers, kind, load in product(args.bases, args.workers, args.kinds, args.loads)
    ]
    each = [(cell, policy) for cell in cells for policy in POLICIES]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(row, *zip(*each, strict=True)))
    print(report.table(HEADINGS, lines(rows)))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "swaps.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
