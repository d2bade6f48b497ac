"""The queued requests, in the order in which they should be dispatched. Pure.

Tenants are ordered by their virtual token counters. A tenant's requests are ordered by deadline in one queue per
adapter, so that a request whose adapter is on no worker never blocks others. Each class has two fair queues: `warm`,
for requests whose adapter is resident on some worker (or that need none), and `cold`. Each base has its own fair
queues, so that requests for a base without free slots never block those for another base. Requests that a worker has
had before come first.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

from protocol.wire.keys import BATCH, CLASSES
from scheduler.fairness import VirtualTokenCounters
from scheduler.request import BASE, QueuedRequest, decrement

MAX_QUEUES_PER_VISIT = 8
"""Maximum number of a tenant's adapter queues whose first request is offered per turn."""


class OfferResult(Enum):
    """The outcome of offering a request for dispatch."""

    PLACED = 0
    HELD = 1  # the request should wait for a better worker; others may overtake it within the slack
    BLOCKED = 2  # no worker may take this request now, but some worker may take others
    FULL = 3  # no worker takes any request of this fair queue
    FULL_FOR_YIELDING = 4  # no worker takes any request that yields


Offer = Callable[[QueuedRequest, bool], OfferResult]
"""Tries to dispatch a request. If the second argument is True, the request may not be held."""

Yields = Callable[[str], bool]
"""Returns whether a tenant's requests yield to those of others."""


@dataclass(slots=True)
class _AdapterQueue:
    """One tenant's requests for one adapter, as a heap. Dropped requests stay until they reach the top or are many."""

    heap: list[tuple[int, int, QueuedRequest]] = field(default_factory=list[tuple[int, int, QueuedRequest]])
    num_live: int = 0

    def push(self, request: QueuedRequest) -> None:
        deadline, order = request.sort_key
        heappush(self.heap, (deadline, order, request))
        self.num_live += 1

    def head(self) -> QueuedRequest | None:
        """Return the first request, after discarding dropped ones before it."""
        while self.heap and self.heap[0][2].dropped:
            heappop(self.heap)
        return self.heap[0][2] if self.heap else None

    def forget_one(self) -> None:
        """Update the counts for a request that was marked as dropped."""
        self.num_live -= 1
        if len(self.heap) > 2 * self.num_live + 16:
            self.heap = [item for item in self.heap if not item[2].dropped]
            heapify(self.heap)


@dataclass(slots=True)
class _Tenant:
    """One tenant's adapter queues in a fair queue. `order`: heap of (deadline, arrival, digest) of heads, or stale."""

    serial: int  # serial of the tenant's valid entry in the fair queue's heap
    queues: dict[str, _AdapterQueue] = field(default_factory=dict[str, _AdapterQueue])
    order: list[tuple[int, int, str]] = field(default_factory=list[tuple[int, int, str]])

    def head(self, digest: str) -> QueuedRequest | None:
        """Return the first request for an adapter."""
        queue = self.queues.get(digest)
        return queue.head() if queue else None

    def note_head(self, digest: str) -> None:
        """Add the first request for an adapter to `order`."""
        head = self.head(digest)
        if head is not None:
            heappush(self.order, (*head.sort_key, digest))
        if len(self.order) > 2 * len(self.queues) + 16:
            heads = ((queue.head(), name) for name, queue in self.queues.items())
            self.order = [(*head.sort_key, name) for head, name in heads if head is not None]
            heapify(self.order)

    def pop_head(self) -> QueuedRequest | None:
        """Remove the first entry from `order` and return the request that it stands for."""
        while self.order:
            deadline, arrival, digest = heappop(self.order)
            head = self.head(digest)
            if head is not None and head.sort_key == (deadline, arrival):
                return head
        return None

    def put_back(self, requests: Sequence[QueuedRequest]) -> None:
        """Undo `pop_head` for those of these requests that are still queued."""
        for request in requests:
            if not request.dropped:
                heappush(self.order, (*request.sort_key, request.submit.digest))


class _Turn(NamedTuple):
    """A tenant's entry in the heap of a fair queue. It is stale if the counter has risen or the serial has changed."""

    counter: float
    serial: int
    tenant: str


class FairQueue:
    """Queued requests of one class and base, warm or cold, served in order of their tenants' virtual token counters."""

    def __init__(self, counters: VirtualTokenCounters) -> None:
        self.counters = counters
        self.tenants: dict[str, _Tenant] = {}
        self.turns: list[_Turn] = []  # a heap; counters only rise, so a stale entry's counter is too low
        self._waiting: dict[str, set[str]] = {}  # digest -> tenants with a queue for it
        self._num_serials = 0

    def __bool__(self) -> bool:
        return bool(self.tenants)

    def push(self, request: QueuedRequest) -> None:
        """Queue a request."""
        name, digest = request.submit.tenant, request.submit.digest
        tenant = self.tenants.get(name)
        if tenant is None:
            self._num_serials += 1
            tenant = self.tenants[name] = _Tenant(self._num_serials)
            heappush(self.turns, _Turn(self.counters.lift(name), self._num_serials, name))
        queue = tenant.queues.get(digest)
        if queue is None:
            queue = tenant.queues[digest] = _AdapterQueue()
            self._waiting.setdefault(digest, set()).add(name)
        queue.push(request)
        if queue.head() is request:
            tenant.note_head(digest)

    def forget(self, request: QueuedRequest) -> None:
        """Update the queues for a request that was just marked as dropped."""
        name, digest = request.submit.tenant, request.submit.digest
        tenant = self.tenants[name]
        queue = tenant.queues[digest]
        was_head = queue.heap[0][2] is request
        queue.forget_one()
        if queue.num_live == 0:
            self._close(name, digest)
        elif was_head:
            tenant.note_head(digest)

    def take_out(self, digest: str) -> list[QueuedRequest]:
        """Remove and return all requests for an adapter."""
        taken: list[QueuedRequest] = []
        for name in tuple(self._waiting.get(digest, ())):
            taken += [item[2] for item in self.tenants[name].queues[digest].heap if not item[2].dropped]
            self._close(name, digest)
        return taken

    def _close(self, name: str, digest: str) -> None:
        tenant = self.tenants[name]
        del tenant.queues[digest]
        if not tenant.queues:
            del self.tenants[name]
        tenants = self._waiting[digest]
        tenants.discard(name)
        if not tenants:
            del self._waiting[digest]

    def scan(self, offer: Offer, *, slack: float, max_refused: int, yields: Yields) -> float | None:
        """Offer requests in order of tenants' counters until no worker takes more or `max_refused` were refused.

        slack: weighted tokens. A tenant whose counter exceeds that of a held request's tenant by more is not served
        before it: the held request is offered again first, and may then no longer be held. Tenants whose requests yield
        are skipped once no worker has free slots for these.

        Returns None if every request was refused or no worker takes more. If some requests were not offered, returns
        the counter up to which `scan_adapters` may serve them.
        """
        return _Scan(self, offer, slack, max_refused, yields).run()

    def scan_adapters(self, digests: Collection[str], offer: Offer, max_counter: float, yields: Yields) -> int:
        """Offer only requests for these adapters, by counter up to `max_counter`, until one is refused.

        This finds work for a worker whose resident adapters only requests far back need. Returns how many were placed.
        """
        heads = self._heads(digests, max_counter)
        num_placed, skips_yielding = 0, False
        while heads and heads[0][0] <= max_counter:
            *_, digest, name = heads[0]
            request = self.tenants[name].head(digest) if name in self.tenants else None
            if request is None or (skips_yielding and yields(name)):
                heappop(heads)
                continue
            current = (self.counters[name], *request.sort_key, digest, name)
            if heads[0] != current:
                heapreplace(heads, current)
                continue
            # Tenants with smaller counters were not scanned, so `least_held` keeps the level unchanged.
            result = self.offer(request, offer, final=False, least_held=0.0)
            if result is OfferResult.PLACED:
                num_placed += 1
            elif result is OfferResult.FULL_FOR_YIELDING:
                skips_yielding = True
            else:
                break
        return num_placed

    def _heads(self, digests: Collection[str], max_counter: float) -> list[tuple[float, int, int, str, str]]:
        """Return a heap of (counter, deadline, arrival, digest, tenant) of the first requests for these adapters."""
        fewer, more = sorted((digests, self._waiting), key=len)
        heads: list[tuple[float, int, int, str, str]] = []
        for digest in fewer:
            for name in self._waiting[digest] if digest in more else ():
                request = self.tenants[name].head(digest)
                if request is not None and self.counters[name] <= max_counter:
                    heads.append((self.counters[name], *request.sort_key, digest, name))
        heapify(heads)
        return heads

    def offer(self, request: QueuedRequest, offer: Offer, *, final: bool, least_held: float | None) -> OfferResult:
        """Offer a request; if it is placed, record in the counters that its tenant was served."""
        if request.dropped:
            return OfferResult.BLOCKED
        tenant = request.submit.tenant
        counter = self.counters[tenant]
        result = offer(request, final)
        if result is OfferResult.PLACED:
            self.counters.serve(tenant, counter, least_held)
        return result

    def first_turn(self) -> _Turn | None:
        """Return the entry of the tenant with the lowest counter, after replacing stale entries before it."""
        while self.turns:
            turn = self.turns[0]
            if not self._is_current(turn):
                heappop(self.turns)
            elif turn.counter < self.counters[turn.tenant]:
                heapreplace(self.turns, turn._replace(counter=self.counters[turn.tenant]))
            else:
                return turn
        return None

    def put_back(self, turns: Sequence[_Turn]) -> None:
        """Restore the tenants that a scan has set aside."""
        for turn in turns:
            heappush(self.turns, turn)
        if len(self.turns) > 2 * len(self.tenants) + 16:
            self.turns = [turn for turn in self.turns if self._is_current(turn)]
            heapify(self.turns)

    def _is_current(self, turn: _Turn) -> bool:
        tenant = self.tenants.get(turn.tenant)
        return tenant is not None and tenant.serial == turn.serial


class _Scan:
    """One scan of a fair queue, see `FairQueue.scan`."""

    def __init__(self, queue: FairQueue, offer: Offer, slack: float, max_refused: int, yields: Yields) -> None:
        self._queue = queue
        self._offer = offer
        self._slack = slack
        self._refusals_left = max_refused
        self._yields = yields
        self._aside: list[_Turn] = []  # entries of tenants that this scan is done with
        self._held: deque[tuple[float, QueuedRequest]] = deque()  # (counter, held request) of tenants, by counter
        self._offered_all = True  # False once a tenant had more adapter queues than one visit offers

    def run(self) -> float | None:
        """Offer requests, then restore the queue's heap. Returns the result of `FairQueue.scan`."""
        is_complete = self._offer_requests()
        self._queue.put_back(self._aside)
        if is_complete:
            return None
        return self._held[0][0] + self._slack if self._held else math.inf

    def _offer_requests(self) -> bool:
        """Serve tenants by counter. Returns False if requests that some worker might take were not offered."""
        while (turn := self._queue.first_turn()) is not None:
            if self._refusals_left <= 0:
                return False
            if self._held and turn.counter > self._held[0][0] + self._slack:
                result = self._offer_held()
            else:
                result = self._visit(turn)
            if result is OfferResult.FULL:
                return True
            if result is OfferResult.FULL_FOR_YIELDING:
                if all(map(self._yields, self._queue.tenants)):
                    return True
                self._pass_over_yielding()
        return self._offered_all and self._refusals_left > 0

    def _offer_held(self) -> OfferResult:
        """Offer the held request with the lowest counter for the last time."""
        counter, request = self._held.popleft()
        return self._queue.offer(request, self._offer, final=True, least_held=counter)

    def _visit(self, turn: _Turn) -> OfferResult:
        """Offer the first requests of a tenant's adapter queues until one is placed; if none is, set the tenant aside.

        Returns the last result.
        """
        tenant = self._queue.tenants[turn.tenant]
        least_held = self._held[0][0] if self._held else None
        held: QueuedRequest | None = None
        offered: list[QueuedRequest] = []
        result = OfferResult.BLOCKED
        while len(offered) < MAX_QUEUES_PER_VISIT and (request := tenant.pop_head()) is not None:
            offered.append(request)
            result = self._queue.offer(request, self._offer, final=False, least_held=least_held)
            if result not in (OfferResult.HELD, OfferResult.BLOCKED):
                break
            self._refusals_left -= 1
            if result is OfferResult.HELD and held is None:
                held = request
        tenant.put_back(offered)
        if result in (OfferResult.HELD, OfferResult.BLOCKED):
            self._aside.append(heappop(self._queue.turns))
            self._offered_all = self._offered_all and len(tenant.queues) <= MAX_QUEUES_PER_VISIT
            if held is not None:
                self._held.append((turn.counter, held))
        return result

    def _pass_over_yielding(self) -> None:
        """Set aside all tenants whose requests yield."""
        others: list[_Turn] = []
        for turn in self._queue.turns:
            (self._aside if self._yields(turn.tenant) else others).append(turn)
        heapify(others)
        self._queue.turns = others


@dataclass(slots=True)
class BaseQueues:
    """The queued requests of one base."""

    fair: dict[tuple[str, bool], FairQueue]  # (class, whether warm) -> queue
    resumed: dict[str, dict[str, QueuedRequest]]
    """Class -> requests that a worker has had before, by id, the longest queued first."""
    num: int = 0

    @classmethod
    def new(cls, counters: VirtualTokenCounters) -> BaseQueues:
        """Return empty queues."""
        fair = {(name, warm): FairQueue(counters) for name in CLASSES for warm in (True, False)}
        return cls(fair, {name: {} for name in CLASSES})


@dataclass(slots=True)
class TenantQueued:
    """The queued requests of one tenant."""

    num: int = 0
    num_batch: int = 0  # those of class batch
    num_tokens: int = 0


class Backlog:
    """All queued requests."""

    def __init__(self, counters: VirtualTokenCounters) -> None:
        self._counters = counters
        self._last_tenant = ""
        self.by_base: dict[str, BaseQueues] = {}
        """The queues of each base that has requests; bases without requests may remain until `drop_empty`."""
        self._warm = {BASE}
        self.num_queued = 0
        self.num_tokens = 0
        """Prompt tokens plus maximum output tokens of all queued requests."""
        self.by_class: Counter[str] = Counter()
        self.by_digest: Counter[str] = Counter()
        self.by_tenant: dict[str, TenantQueued] = {}

    def of(self, base: str) -> BaseQueues:
        """Return the queues of a base."""
        queues = self.by_base.get(base)
        if queues is None:
            queues = self.by_base[base] = BaseQueues.new(self._counters)
        return queues

    @property
    def has_cold(self) -> bool:
        """Whether requests are queued whose adapter is not resident on any worker."""
        return any(queues.fair[cls, False] for queues in self.by_base.values() for cls in CLASSES)

    def push(self, request: QueuedRequest) -> None:
        """Queue a request. A removed one must return as a copy, since heaps may still contain the old object."""
        assert not request.dropped
        if self.num_queued == 0:
            self._counters.rise_to(self._last_tenant)
        self.num_queued += 1
        self.by_class[request.submit.cls] += 1
        self.by_digest[request.submit.digest] += 1
        self.num_tokens += _max_tokens(request)
        self._count_for_tenant(request, 1)
        queues = self.of(request.submit.base)
        queues.num += 1
        if request.resumed:
            queues.resumed[request.submit.cls][request.rid] = request
        else:
            queues.fair[request.submit.cls, request.submit.digest in self._warm].push(request)

    def remove(self, request: QueuedRequest) -> None:
        """Remove a queued request that was dispatched or has ended."""
        request.dropped = True
        self._last_tenant = request.submit.tenant
        self.num_queued -= 1
        self.by_class[request.submit.cls] -= 1
        decrement(self.by_digest, request.submit.digest)
        self.num_tokens -= _max_tokens(request)
        self._count_for_tenant(request, -1)
        queues = self.by_base[request.submit.base]
        queues.num -= 1
        if queues.resumed[request.submit.cls].pop(request.rid, None) is None:
            queues.fair[request.submit.cls, request.submit.digest in self._warm].forget(request)

    def _count_for_tenant(self, request: QueuedRequest, change: int) -> None:
        tenant = request.submit.tenant
        queued = self.by_tenant.get(tenant) or self.by_tenant.setdefault(tenant, TenantQueued())
        queued.num += change
        queued.num_batch += change * (request.submit.cls == BATCH)
        queued.num_tokens += change * _max_tokens(request)
        if not queued.num:
            del self.by_tenant[tenant]

    def drop_empty(self) -> None:
        """Drop the queues of bases without requests. Must not be called during a scan."""
        for base in [base for base, queues in self.by_base.items() if not queues.num]:
            del self.by_base[base]

    def set_warm(self, digest: str, warm: bool) -> None:
        """Record that an adapter has become resident on some worker, or is no longer resident on any."""
        if digest == BASE or self.is_warm(digest) == warm:
            return
        if warm:
            self._warm.add(digest)
        else:
            self._warm.discard(digest)
        for queues in self.by_base.values():
            for cls in CLASSES:
                for request in queues.fair[cls, not warm].take_out(digest):
                    queues.fair[cls, warm].push(request)

    def is_warm(self, digest: str) -> bool:
        """Return whether an adapter is resident on some worker. The base model always is."""
        return digest in self._warm


def _max_tokens(request: QueuedRequest) -> int:
    return request.submit.num_prefill_tokens + request.submit.max_new_tokens
