"""Which worker a request should go to: the one with the least estimated wait, in ms.

The wait is the prompts in front of it, the way its adapter still has to come, and what its decoding takes in that
worker's batch, which depends on the ranks in it. An adapter that is nowhere goes to its rendezvous worker, a hot
one to as many as its load needs; and no worker that is nearly full gets more than 1.25 times the mean load while
others are free.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from scheduler.backlog import Verdict
from scheduler.fleet import Fleet, Tier, Worker, num_kept
from scheduler.request import BASE, Request

LOAD_BOUND = 1.25
"""Largest load of a worker in units of the mean."""

FREE_SHARE = 0.75
"""Share of a worker's capacity up to which the estimates alone decide. In simulation they place better than the bound
(8 workers, 200 adapters, half loaded: 172 adapter loads; 282 with 0.125); the bound is for when they are wrong."""

HOME_SHARE = 0.125
"""Requests for one adapter that are worth a home of their own, as a share of a worker's capacity."""

MAX_CANDIDATES = 8
"""Workers scored for one request, of a large fleet."""

SHRINK_TICKS = 3
"""Ticks in a row with less load before an adapter loses a home."""

MAX_PREFIXES = 16_384
"""Prompt beginnings remembered with the worker that computed them."""

MAX_KNOWN_ADAPTERS = 100_000
"""Adapters whose rank and size are remembered."""

SUSPECTS_PER_WORKER = 8
"""Requests whose worker has died that may start together on another; those with one life left start alone."""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What placement knows of an adapter."""

    rank: int = 16
    num_bytes: int = 20_000_000


DEFAULT_FACTS = AdapterFacts()
"""Of an adapter that the catalogue does not describe."""


@dataclass(slots=True)
class Bandwidths:
    """Bytes per ms on an adapter's way to a worker's pool, and what each way costs at least, in ms."""

    host: float = 2e6
    remote: float = 2e5
    host_ms: float = 1.0
    remote_ms: float = 10.0

    def cost_ms(self, tier: Tier, num_bytes: int) -> float:
        """Estimate how long an adapter at `tier` takes until it is resident."""
        if tier is Tier.RESIDENT:
            return 0.0
        if tier is Tier.HOST:
            return self.host_ms + num_bytes / self.host
        whole_ms = self.remote_ms + num_bytes / self.remote
        return whole_ms / 2 if tier is Tier.LOADING else whole_ms  # on its way: half of it, on average


@dataclass(slots=True)
class _Homes:
    """How many workers an adapter belongs on."""

    num: int = 1
    ticks_below: int = 0


class Homes:
    """On how many workers each adapter belongs: grows with its load at once, shrinks after a while."""

    def __init__(self) -> None:
        self._homes: dict[str, _Homes] = {}
        self._grown: list[str] = []

    def __getitem__(self, digest: str) -> int:
        home = self._homes.get(digest)
        return home.num if home else 1

    def grown(self) -> list[str]:
        """Return the adapters whose homes became more at the last tick."""
        return self._grown

    def tick(self, demand: Mapping[str, int], worker_share: float) -> None:
        """Take the requests queued or running per adapter, and how many of one adapter a worker should have."""
        self._grown = []
        for digest in [*demand, *(self._homes.keys() - demand.keys())]:
            needed = max(1, math.ceil(demand.get(digest, 0) / worker_share))
            home = self._homes.get(digest)
            if home is None:
                if needed > 1:
                    self._homes[digest] = _Homes(needed)
                    self._grown.append(digest)
            elif needed >= home.num:
                if needed > home.num:
                    self._grown.append(digest)
                home.num, home.ticks_below = needed, 0
            else:
                home.ticks_below += 1
                if home.ticks_below >= SHRINK_TICKS:
                    home.num, home.ticks_below = home.num - 1, 0
                    if home.num == 1:
                        del self._homes[digest]


class Rendezvous:
    """Order of workers by adapter, by highest random weight: a worker that comes or goes moves only its share."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[str, int]] = {}
        self._orders: dict[str, tuple[str, ...]] = {}

    def set_members(self, members: Mapping[str, tuple[str, int]]) -> None:
        """Take the workers there are: wid -> (name, capacity)."""
        if members != self._members:
            self._members = dict(members)
            self._orders.clear()

    def order(self, digest: str) -> tuple[str, ...]:
        """Return the wids, the one where `digest` belongs first. The name counts, so a restart moves nothing."""
        order = self._orders.get(digest)
        if order is None:
            if len(self._orders) > 10_000:
                self._orders.clear()
            scores = {wid: _weight(digest, name, capacity) for wid, (name, capacity) in self._members.items()}
            order = self._orders[digest] = tuple(sorted(scores, key=scores.__getitem__, reverse=True))
        return order


def _weight(digest: str, name: str, capacity: int) -> float:
    raw = int.from_bytes(blake2b(f"{digest}\0{name}".encode(), digest_size=8).digest(), "big")
    return -capacity / math.log((raw + 0.5) / 2**64)


@dataclass(slots=True)
class _Best:
    """The least wait among the workers seen."""

    wait_ms: float = math.inf
    worker: Worker | None = None


class Placement:
    """Chooses workers. What it keeps between decisions are only hints."""

    def __init__(self, fleet: Fleet, max_attempts: int, max_known_adapters: int = MAX_KNOWN_ADAPTERS) -> None:
        self._fleet = fleet
        self._max_known_adapters = max_known_adapters
        self._max_attempts = max_attempts
        self.bandwidths = Bandwidths()
        self.homes = Homes()
        self._facts: dict[str, AdapterFacts] = {}  # the one learnt longest ago first
        self._rendezvous = Rendezvous()
        self._prefixes: dict[str, str] = {}  # prompt's first blocks -> worker that computed them last
        self._workers: list[Worker] = []
        self._version = -1
        self.total_capacity = 0
        self.num_kept = 0
        """Places that requests which give way leave free."""
        self._turn = 0

    def begin(self) -> None:
        """Look at the fleet anew. Until the next call no worker comes or goes."""
        if self._version == self._fleet.version:
            return
        self._version = self._fleet.version
        self._workers = list(self._fleet.available())
        self.total_capacity = sum(worker.beat.capacity for worker in self._workers)
        self.num_kept = sum(num_kept(worker.beat.capacity) for worker in self._workers)
        self._rendezvous.set_members({w.wid: (w.beat.name, w.beat.capacity) for w in self._workers})

    def took(self, request: Request, worker: Worker, now_ms: float) -> None:
        """Note an assignment."""
        worker.prefill_until_ms = max(worker.prefill_until_ms, now_ms) + self._prefill_ms(worker, request)
        if prefix := request.submit.prefix:
            self._prefixes.pop(prefix, None)
            self._prefixes[prefix] = worker.wid
            if len(self._prefixes) > MAX_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]

    def learn(self, digest: str, facts: AdapterFacts) -> None:
        """Remember an adapter's rank and size, and forget the one learnt longest ago when there are too many."""
        self._facts.pop(digest, None)
        self._facts[digest] = facts
        if len(self._facts) > self._max_known_adapters:
            del self._facts[next(iter(self._facts))]

    def unknown(self, digests: Iterable[str]) -> list[str]:
        """Return those of the adapters, each once, of which nothing has been learnt, or it was forgotten."""
        return [digest for digest in dict.fromkeys(digests) if digest != BASE and digest not in self._facts]

    def rank_of(self, digest: str) -> int:
        return self._facts.get(digest, DEFAULT_FACTS).rank

    def home(self, digest: str) -> str | None:
        """Return the worker on which an adapter should be first."""
        order = self._rendezvous.order(digest)
        return order[0] if order else None

    def has_room(self, request: Request, *, gives_way: bool = False, over_share: bool = False) -> bool:
        """Tell whether any worker takes requests like this one: of its class, and their adapter there, or not."""
        cls, digest = request.submit.cls, request.submit.digest
        if digest == BASE or digest in self._fleet.holders:
            return any(w.ready_credit(cls, gives_way=gives_way, over_share=over_share) > 0 for w in self._workers)
        return any(worker.takes_cold("?", cls, gives_way=gives_way) for worker in self._workers)

    def with_room(self, cls: str) -> list[Worker]:
        """Return the workers that take requests whose adapter is there."""
        return [worker for worker in self._workers if worker.ready_credit(cls) > 0]

    def tick(self, queued: Mapping[str, int]) -> list[tuple[str, str]]:
        """Adapt the homes of hot adapters, once a second, to the requests queued per adapter and those assigned.

        Returns the (wid, digest) of homes that have yet to get their adapter.
        """
        if not self._workers:
            return []
        demand = Counter(queued)
        for worker in self._workers:
            demand.update(worker.by_digest)
        del demand[BASE]
        mean_load = self._fleet.num_assigned / len(self._workers)
        mean_capacity = self.total_capacity / len(self._workers)
        self.homes.tick(demand, max(LOAD_BOUND * mean_load, mean_capacity * HOME_SHARE, 1.0))
        return [
            (wid, digest)
            for digest in self.homes.grown()
            for wid in self._rendezvous.order(digest)[: self.homes[digest]]
            if self._fleet.workers[wid].tier(digest) is Tier.REMOTE
        ]

    def choose(self, request: Request, output_tokens: float, now_ms: float, *, final: bool) -> Worker | Verdict:
        """Return the worker with the least wait, or HELD when a warmer one is worth waiting for, or BLOCKED.

        A request is held no longer than its adapter would take to come to the worker that is free, so it never
        takes more than twice as long as the better of both choices; with `final` it is not held at all.
        """
        digest = request.submit.digest
        facts = self._facts.get(digest, DEFAULT_FACTS)
        holders = self._fleet.holders.get(digest, ())
        homes = self._rendezvous.order(digest)[: self.homes[digest]] if digest != BASE else ()
        best, crowded = _Best(), _Best()
        preferred_open = digest == BASE
        for worker in self._candidates(request, holders, homes):
            tier = worker.tier(digest)
            if not self._takes(worker, request, tier, bool(holders)):
                continue
            is_preferred = worker.wid in (holders or homes)
            preferred_open = preferred_open or is_preferred
            wait_ms = self.bandwidths.cost_ms(tier, facts.num_bytes)
            if not is_preferred:
                wait_ms *= 2  # a move has to be worth one more load
            wait_ms += max(0.0, worker.prefill_until_ms - now_ms)
            wait_ms += self._prefill_ms(worker, request) + self._batch_ms(worker, request, output_tokens, facts.rank)
            place = crowded if self._is_crowded(worker) else best
            if wait_ms < place.wait_ms:
                place.wait_ms, place.worker = wait_ms, worker
        worker = best.worker or crowded.worker
        if worker is None:
            return Verdict.BLOCKED
        if preferred_open or final:
            return worker
        patience_ms = self.bandwidths.cost_ms(worker.tier(digest), facts.num_bytes)
        if request.held_since_ms < 0:
            request.held_since_ms = now_ms
        request.held_until_ms = request.held_since_ms + patience_ms
        return Verdict.HELD if now_ms < request.held_until_ms else worker

    def _takes(self, worker: Worker, request: Request, tier: Tier, warm_elsewhere: bool) -> bool:
        cls, digest = request.submit.cls, request.submit.digest
        if request.attempts:
            if request.attempts >= self._max_attempts - 1:
                if any(attempts >= request.attempts for attempts in worker.suspects):
                    return False
            elif worker.suspects.total() >= SUSPECTS_PER_WORKER:
                return False
        if tier is Tier.RESIDENT:
            return _has_credit(worker, request)
        # Bringing an adapter to one more worker only helps where there is room to run it.
        if not worker.takes_cold(digest, cls, gives_way=request.gives_way):
            return False
        return not warm_elsewhere or _has_credit(worker, request)

    def _batch_ms(self, worker: Worker, request: Request, output_tokens: float, rank: int) -> float:
        """Estimate how long the request queues and decodes in a worker's batch."""
        sub = request.submit
        step_ms = 1000 * worker.step_s(request, sub.num_prompt_tokens + round(output_tokens), rank)
        decode_ms = output_tokens * step_ms
        num_ahead = worker.num_in_front(over_share=request.over_share) + 1 - worker.beat.capacity
        if num_ahead > 0:
            decode_ms *= 1 + num_ahead / worker.beat.capacity  # slots come free evenly
        return decode_ms

    def _prefill_ms(self, worker: Worker, request: Request) -> float:
        """Estimate what the prompt takes; next to nothing where its beginning was computed last."""
        sub = request.submit
        known = sub.prefix and self._prefixes.get(sub.prefix) == worker.wid
        return 0.0 if known else 1000 * worker.model.b * sub.num_prompt_tokens

    def _is_crowded(self, worker: Worker) -> bool:
        capacity = worker.beat.capacity
        fair_load = LOAD_BOUND * (self._fleet.num_assigned + 1) * capacity / self.total_capacity
        return len(worker.requests) + 1 > max(fair_load, capacity * FREE_SHARE, 1)

    def _candidates(self, request: Request, holders: Collection[str], homes: Collection[str]) -> Iterable[Worker]:
        """Return the workers to score: all of a small fleet; else where the adapter is or belongs, and some others."""
        if len(self._workers) <= MAX_CANDIDATES:
            return self._workers
        self._turn += 1
        half = MAX_CANDIDATES // 2
        if request.submit.digest != BASE and not holders:
            known = [self._fleet.workers[wid] for wid in homes]
            return {worker.wid: worker for worker in (*known[:half], *self._some(self._workers, half, None))}.values()
        known = [self._fleet.workers[wid] for wid in (*holders, *homes)]
        chosen = (*self._some(known, half, request), *self._some(self._workers, half, request))
        return {worker.wid: worker for worker in chosen}.values()

    def _some(self, workers: list[Worker], num: int, request: Request | None) -> list[Worker]:
        """Return `num` of the workers, others at each turn; with a request, of those that have room for it."""
        found: list[Worker] = []
        start = self._turn * num
        for i in range(start, start + len(workers)):
            worker = workers[i % len(workers)]
            if request is None or _has_credit(worker, request):
                found.append(worker)
                if len(found) == num:
                    break
        return found


def _has_credit(worker: Worker, request: Request) -> bool:
    return worker.ready_credit(request.submit.cls, gives_way=request.gives_way, over_share=request.over_share) > 0
