"""Chooses the worker of a request's base with the shortest estimated wait, in ms. Pure.

The wait is the time for queued prompts, for loading the adapter, and for decoding in that worker's batch, which depends
on the ranks in it. An adapter that is on no worker is sent to its home, the first worker by rendezvous hashing (Thaler
and Ravishankar, 1998); an adapter with a high load has several homes. A nearly full worker gets at most 1.25 times the
mean load while others are free (consistent hashing with bounded loads, Mirrokni et al., 2018).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from scheduler.backlog import OfferResult
from scheduler.request import BASE, Candidate, QueuedRequest, WorkerChoice
from scheduler.workers import Tier, Worker, Workers, num_reserved

LOAD_BOUND = 1.25
"""Maximum load of a worker, as a multiple of the mean."""

FREE_SHARE = 0.75
"""Fraction of a worker's capacity below which `LOAD_BOUND` does not apply. In simulation, estimates alone place better
(8 workers, 200 adapters, half loaded: 172 adapter loads; 282 with 0.125); the bound helps when they are wrong.
"""

HOME_SHARE = 0.125
"""Requests for one adapter, as a fraction of a worker's capacity, for which it gets another home."""

MAX_CANDIDATES = 8
"""Maximum number of workers whose wait is estimated for one request; in a larger fleet, a selection is."""

SHRINK_TICKS = 3
"""Consecutive ticks with less load after which an adapter loses a home."""

MAX_PREFIXES = 16_384
"""Maximum number of prompt prefixes remembered with the worker that computed them."""

MAX_KNOWN_ADAPTERS = 100_000
"""Maximum number of adapters whose rank and size are remembered."""

SUSPECTS_PER_WORKER = 8
"""Maximum number of suspects that may start together on a worker. A suspect on its final attempt waits until no other
one on its final attempt is starting there.
"""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """The properties of an adapter that placement needs."""

    rank: int = 16
    num_bytes: int = 20_000_000
    base: str = ""  # name of the base with which it was first requested


DEFAULT_FACTS = AdapterFacts()
"""Assumed for an adapter without a readable record."""


@dataclass(slots=True)
class Bandwidths:
    """Estimated bandwidths and latencies of loading adapters."""

    host: float = 2e6  # bytes per ms from host memory into the pool
    remote: float = 2e5  # bytes per ms from the store to host memory
    host_ms: float = 1.0  # latency
    remote_ms: float = 10.0  # latency

    def cost_ms(self, tier: Tier, num_bytes: int) -> float:
        """Estimate the ms until an adapter of `num_bytes` at `tier` is resident."""
        if tier is Tier.RESIDENT:
            return 0.0
        if tier is Tier.HOST:
            return self.host_ms + num_bytes / self.host
        whole_ms = self.remote_ms + num_bytes / self.remote
        return whole_ms / 2 if tier is Tier.LOADING else whole_ms  # on average, half of it is done


@dataclass(slots=True)
class _NumHomes:
    """The number of homes of an adapter."""

    num: int = 1
    ticks_below: int = 0


class Homes:
    """The number of homes of each adapter: as many as its load needs, fewer only after several ticks below that."""

    def __init__(self) -> None:
        self._homes: dict[str, _NumHomes] = {}
        self._grown: list[str] = []

    def __getitem__(self, digest: str) -> int:
        """Return an adapter's number of homes."""
        home = self._homes.get(digest)
        return home.num if home else 1

    def grown(self) -> list[str]:
        """Return the adapters that got more homes at the last tick."""
        return self._grown

    def tick(self, demand: Mapping[str, int], worker_share: float) -> None:
        """Update the numbers of homes. demand: open requests by adapter. worker_share: maximum requests per home."""
        self._grown = []
        for digest in [*demand, *(self._homes.keys() - demand.keys())]:
            needed = max(1, math.ceil(demand.get(digest, 0) / worker_share))
            home = self._homes.get(digest)
            if home is None:
                if needed > 1:
                    self._homes[digest] = _NumHomes(needed)
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
    """Orders workers per adapter by highest random weight, so that a worker's change moves only its own adapters."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[str, int]] = {}
        self._orders: dict[str, tuple[str, ...]] = {}

    def set_members(self, members: Mapping[str, tuple[str, int]]) -> None:
        """Set the current workers: wid -> (name, capacity)."""
        if members != self._members:
            self._members = dict(members)
            self._orders.clear()

    def order(self, digest: str) -> tuple[str, ...]:
        """Return the ids of workers in an adapter's order. It depends on their names, so a restart changes nothing."""
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
class BaseWorkers:
    """The available workers of a base."""

    workers: list[Worker] = field(default_factory=list[Worker])
    capacity: int = 0  # slots of all workers
    num_reserved: int = 0  # reserved ones of these slots, see `workers.num_reserved`
    rendezvous: Rendezvous = field(default_factory=Rendezvous)

    def set_workers(self, workers: list[Worker]) -> None:
        """Set the workers that are available now."""
        self.workers = workers
        self.capacity = sum(worker.beat.capacity for worker in workers)
        self.num_reserved = sum(num_reserved(worker.beat.capacity) for worker in workers)
        self.rendezvous.set_members({w.wid: (w.beat.name, w.beat.capacity) for w in workers})


@dataclass(slots=True)
class _Best:
    """The worker with the shortest wait so far."""

    wait_ms: float = math.inf
    worker: Worker | None = None
    index: int = 0  # index of the worker in the candidates


class Placement:
    """Chooses workers. State kept between decisions only improves estimates."""

    def __init__(self, workers: Workers, max_attempts: int, max_known_adapters: int = MAX_KNOWN_ADAPTERS) -> None:
        self._workers = workers
        self._max_known_adapters = max_known_adapters
        self._max_attempts = max_attempts
        self.bandwidths = Bandwidths()
        self.homes = Homes()
        self._facts: dict[str, AdapterFacts] = {}  # the oldest entry first
        self._groups: dict[str, BaseWorkers] = {}  # by base
        self._prefixes: dict[str, str] = {}  # hash of a prompt's first blocks -> worker that computed them last
        self._available: list[Worker] = []
        self._version = -1
        self._turn = 0

    def refresh(self) -> None:
        """Update the available workers. They stay the same until the next call."""
        if self._version == self._workers.version:
            return
        self._version = self._workers.version
        self._available = list(self._workers.available())
        by_base: defaultdict[str, list[Worker]] = defaultdict(list)
        for worker in self._available:
            by_base[self._workers.base_of(worker.beat.base)].append(worker)
        self._groups = {base: self._groups.get(base) or BaseWorkers() for base in by_base}
        for base, group in self._groups.items():
            group.set_workers(by_base[base])

    def group(self, base: str) -> BaseWorkers:
        """Return the available workers of a base."""
        return self._groups.get(self._workers.base_of(base)) or BaseWorkers()

    def note_assigned(self, request: QueuedRequest, worker: Worker, now_ms: float) -> None:
        """Record that a request was assigned to a worker."""
        worker.prefill_until_ms = max(worker.prefill_until_ms, now_ms) + self._prefill_ms(worker, request)
        if prefix := request.submit.prefix:
            self._prefixes.pop(prefix, None)
            self._prefixes[prefix] = worker.wid
            if len(self._prefixes) > MAX_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]

    def learn(self, digest: str, facts: AdapterFacts) -> None:
        """Remember an adapter's rank and size; drops the oldest entry if there are too many."""
        self._facts.pop(digest, None)
        self._facts[digest] = facts
        if len(self._facts) > self._max_known_adapters:
            del self._facts[next(iter(self._facts))]

    def unknown(self, digests: Iterable[str]) -> list[str]:
        """Return the distinct adapters among these whose facts are not known, or no longer."""
        return [digest for digest in dict.fromkeys(digests) if digest != BASE and digest not in self._facts]

    def facts_of(self, digest: str) -> AdapterFacts:
        """Return the known facts of an adapter, or the default ones."""
        return self._facts.get(digest, DEFAULT_FACTS)

    def rank_of(self, digest: str) -> int:
        """Return an adapter's rank, or the default rank."""
        return self.facts_of(digest).rank

    def home(self, base: str, digest: str) -> str | None:
        """Return the id of an adapter's first home among the workers of a base, None without workers."""
        order = self.group(base).rendezvous.order(digest)
        return order[0] if order else None

    def has_room(self, request: QueuedRequest, *, yields: bool | None = None) -> bool:
        """Return whether any worker takes such a request: of its base and class, warm or cold, yielding or not.

        yields: overrides the request's own value; None: does not.
        """
        cls, digest = request.submit.cls, request.submit.digest
        yields = request.yields if yields is None else yields
        workers = self.group(request.submit.base).workers
        if digest == BASE or digest in self._workers.holders:
            return any(worker.ready_credit(cls, yields=yields) > 0 for worker in workers)
        return any(worker.takes_cold("?", cls, yields=yields) for worker in workers)

    def with_room(self, base: str, cls: str) -> list[Worker]:
        """Return the workers of a base that take requests of a class if the adapter is resident there."""
        return [worker for worker in self.group(base).workers if worker.ready_credit(cls) > 0]

    def tick(self, queued: Mapping[str, int]) -> list[tuple[str, str]]:
        """Adapt the numbers of homes to the requests per adapter: `queued`, plus those on workers.

        Returns (worker, adapter) of the homes that do not have their adapter yet.
        """
        if not self._available:
            return []
        demand = Counter(queued)
        for worker in self._available:
            demand.update(worker.by_digest)
        del demand[BASE]
        mean_load = self._workers.num_assigned / len(self._available)
        mean_capacity = sum(worker.beat.capacity for worker in self._available) / len(self._available)
        self.homes.tick(demand, max(LOAD_BOUND * mean_load, mean_capacity * HOME_SHARE, 1.0))
        return [
            (wid, digest)
            for digest in self.homes.grown()
            for wid in self._homes_of(digest)
            if self._workers.by_id[wid].tier(digest) is Tier.REMOTE
        ]

    def _homes_of(self, digest: str) -> tuple[str, ...]:
        return self.group(self.facts_of(digest).base).rendezvous.order(digest)[: self.homes[digest]]

    def choose(
        self, request: QueuedRequest, output_tokens: float, now_ms: float, *, final: bool
    ) -> Worker | OfferResult:
        """Return the worker with the shortest wait, HELD if waiting for one with the adapter pays off, or BLOCKED.

        A request is held no longer than its adapter would take to load on the free worker. So it never waits more than
        twice as long as with the better of both choices. final: do not hold it.
        """
        digest = request.submit.digest
        facts = self.facts_of(digest)
        group, holders = self.group(request.submit.base), self._workers.holders.get(digest, ())
        homes = group.rendezvous.order(digest)[: self.homes[digest]] if digest != BASE else ()
        load = self._workers.num_assigned
        if len(self._groups) > 1:  # count only the workers of this base
            holders = [wid for wid in holders if self._workers.by_id[wid].beat.base == request.submit.base]
            load = sum(worker.load for worker in group.workers)
        best, crowded = _Best(), _Best()
        candidates: list[Candidate] = []
        preferred_open = digest == BASE
        for worker in self._candidates(request, group.workers, holders, homes):
            tier = worker.tier(digest)
            if not self._takes(worker, request, tier, bool(holders)):
                continue
            is_preferred = worker.wid in (holders or homes)
            preferred_open = preferred_open or is_preferred
            wait_ms = self.bandwidths.cost_ms(tier, facts.num_bytes)
            if not is_preferred:
                wait_ms *= 2  # a further copy of the adapter must save more than it costs
            wait_ms += max(0.0, worker.prefill_until_ms - now_ms)
            wait_ms += self._prefill_ms(worker, request) + self._batch_ms(worker, request, output_tokens, facts.rank)
            is_crowded = _is_crowded(worker, load, group.capacity)
            candidates.append(Candidate(worker.beat.name, wait_ms, tier, is_crowded))
            place = crowded if is_crowded else best
            if wait_ms < place.wait_ms:
                place.wait_ms, place.worker, place.index = wait_ms, worker, len(candidates) - 1
        found = best if best.worker is not None else crowded
        worker = found.worker
        if worker is None:
            return OfferResult.BLOCKED
        request.choice = WorkerChoice(
            _reason(request, candidates, found is crowded), candidates[found.index], candidates
        )
        if preferred_open or final:
            return worker
        patience_ms = self.bandwidths.cost_ms(worker.tier(digest), facts.num_bytes)
        if request.held_since_ms < 0:
            request.held_since_ms = now_ms
        request.held_until_ms = request.held_since_ms + patience_ms
        if now_ms >= request.held_until_ms:
            return worker
        request.choice = None
        return OfferResult.HELD

    def _takes(self, worker: Worker, request: QueuedRequest, tier: Tier, warm_elsewhere: bool) -> bool:
        cls, digest = request.submit.cls, request.submit.digest
        if not worker.understands(request):
            return False
        if request.attempts:
            if request.attempts >= self._max_attempts - 1:
                if any(attempts >= request.attempts for attempts in worker.suspects):
                    return False
            elif worker.suspects.total() >= SUSPECTS_PER_WORKER:
                return False
        if tier is Tier.RESIDENT:
            return _has_credit(worker, request)
        # Loading an adapter on one more worker only helps if that worker has a free slot for the request.
        if not worker.takes_cold(digest, cls, yields=request.yields):
            return False
        return not warm_elsewhere or _has_credit(worker, request)

    def _batch_ms(self, worker: Worker, request: QueuedRequest, output_tokens: float, rank: int) -> float:
        """Estimate the ms for which a request is queued and decoded in a worker's batch."""
        sub = request.submit
        step_ms = 1000 * worker.step_s(request, sub.num_prefill_tokens + round(output_tokens), rank)
        decode_ms = output_tokens * step_ms
        num_ahead = worker.num_in_front(sub.cls, yields=request.yields) + 1 - worker.beat.capacity
        if num_ahead > 0:
            decode_ms *= 1 + num_ahead / worker.beat.capacity  # slots are assumed to become free at even intervals
        return decode_ms

    def _prefill_ms(self, worker: Worker, request: QueuedRequest) -> float:
        """Estimate the ms of a request's prefill: 0 on the worker that last computed the same prompt prefix."""
        sub = request.submit
        known = sub.prefix and self._prefixes.get(sub.prefix) == worker.wid
        return 0.0 if known else 1000 * worker.model.b * sub.num_prefill_tokens

    def _candidates(
        self, request: QueuedRequest, available: list[Worker], holders: Collection[str], homes: Collection[str]
    ) -> Iterable[Worker]:
        """Return the workers to consider: all if they are few, else some of the adapter's holders or homes and more."""
        if request.submit.needs:
            available = [worker for worker in available if worker.understands(request)]
        if len(available) <= MAX_CANDIDATES:
            return available
        self._turn += 1
        half = MAX_CANDIDATES // 2
        if request.submit.digest != BASE and not holders:
            known = [self._workers.by_id[wid] for wid in homes]
            return {worker.wid: worker for worker in (*known[:half], *self._some(available, half, None))}.values()
        known = [self._workers.by_id[wid] for wid in (*holders, *homes)]
        chosen = (*self._some(known, half, request), *self._some(available, half, request))
        return {worker.wid: worker for worker in chosen}.values()

    def _some(self, workers: list[Worker], num: int, request: QueuedRequest | None) -> list[Worker]:
        """Return `num` of the workers, different ones at each call; with a request, only workers with a slot for it."""
        found: list[Worker] = []
        start = self._turn * num
        for i in range(start, start + len(workers)):
            worker = workers[i % len(workers)]
            if request is None or _has_credit(worker, request):
                found.append(worker)
                if len(found) == num:
                    break
        return found


def _reason(request: QueuedRequest, candidates: list[Candidate], all_crowded: bool) -> str:
    """Return why the worker with the shortest wait gets a request, one of `messages.REASONS`."""
    if request.resumed:
        return "resumed"
    if request.held_since_ms >= 0:
        return "held_enough"
    if len(candidates) == 1:
        return "only_place"
    return "all_crowded" if all_crowded else "least_wait"


def _is_crowded(worker: Worker, load: int, total_capacity: int) -> bool:
    """Return whether one more request exceeds a worker's share of `load` requests on `total_capacity` slots."""
    capacity = worker.beat.capacity
    fair_load = LOAD_BOUND * (load + 1) * capacity / total_capacity
    return len(worker.requests) + 1 > max(fair_load, capacity * FREE_SHARE, 1)


def _has_credit(worker: Worker, request: QueuedRequest) -> bool:
    return worker.ready_credit(request.submit.cls, yields=request.yields) > 0
