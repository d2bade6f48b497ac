"""What is queued, in the order in which it should be dispatched.

Tenants come by their token counters, a tenant's requests by deadline, with one queue per adapter, so that a request
whose adapter is nowhere never stands before others. Requests of a class lie in one of two lanes: `warm`, whose
adapter is on some worker (or who need none), and `cold`. Requests that a worker has had before come first of all.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush, heapreplace

from protocol.wire.keys import CLASSES
from scheduler.fairness import TokenCounters
from scheduler.request import BASE, Request, decrement

MAX_QUEUES_PER_VISIT = 8
"""Adapter queues of one tenant looked at before the next tenant's turn."""


class Verdict(Enum):
    """What became of a request offered for dispatch."""

    PLACED = 0
    HELD = 1  # a better worker is worth waiting for; others may pass within the slack
    BLOCKED = 2  # no worker may take it now, but one may take others
    FULL = 3  # no worker takes any request of this lane
    BARRED = 4  # no worker takes any of those who give way


Offer = Callable[[Request, bool], Verdict]
"""Try to dispatch a request; with True it may not be held."""


@dataclass(slots=True)
class _Queue:
    """One tenant's requests for one adapter, a heap. Dropped requests stay until they come up or are too many."""

    heap: list[tuple[int, int, Request]] = field(default_factory=list)
    num_live: int = 0

    def push(self, request: Request) -> None:
        deadline, order = request.sort_key
        heappush(self.heap, (deadline, order, request))
        self.num_live += 1

    def head(self) -> Request | None:
        while self.heap and self.heap[0][2].dropped:
            heappop(self.heap)
        return self.heap[0][2] if self.heap else None

    def forget_one(self) -> None:
        self.num_live -= 1
        if len(self.heap) > 2 * self.num_live + 16:
            self.heap = [item for item in self.heap if not item[2].dropped]
            heapify(self.heap)


@dataclass(slots=True)
class _Tenant:
    """One tenant's adapter queues in one lane. `order` holds (deadline, arrival, digest) of heads, maybe outdated."""

    token: int  # marks the one entry of the lane's heap that counts
    queues: dict[str, _Queue] = field(default_factory=dict)
    order: list[tuple[int, int, str]] = field(default_factory=list)

    def note_head(self, digest: str) -> None:
        head = self.queues[digest].head()
        if head is not None:
            heappush(self.order, (*head.sort_key, digest))
        if len(self.order) > 2 * len(self.queues) + 16:
            heads = ((queue.head(), name) for name, queue in self.queues.items())
            self.order = [(*head.sort_key, name) for head, name in heads if head is not None]
            heapify(self.order)

    def pop_head(self) -> Request | None:
        """Take the entry of the first queue out of `order` and return that queue's first request."""
        while self.order:
            deadline, arrival, digest = heappop(self.order)
            queue = self.queues.get(digest)
            head = queue.head() if queue else None
            if head is not None and head.sort_key == (deadline, arrival):
                return head
        return None


def _nobody(tenant: str) -> bool:
    return False


class Lane:
    """Queued requests of one class and temperature."""

    def __init__(self, counters: TokenCounters) -> None:
        self._counters = counters
        self._tenants: dict[str, _Tenant] = {}
        self._heap: list[tuple[float, int, str]] = []  # (counter, token, tenant); counters only rise, so never too high
        self._waiting: dict[str, set[str]] = {}  # digest -> tenants with a queue for it
        self._tokens = 0

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def push(self, request: Request) -> None:
        name, digest = request.submit.tenant, request.submit.digest
        tenant = self._tenants.get(name)
        if tenant is None:
            self._tokens += 1
            tenant = self._tenants[name] = _Tenant(self._tokens)
            heappush(self._heap, (self._counters.lift(name), self._tokens, name))
        queue = tenant.queues.get(digest)
        if queue is None:
            queue = tenant.queues[digest] = _Queue()
            self._waiting.setdefault(digest, set()).add(name)
        queue.push(request)
        if queue.head() is request:
            tenant.note_head(digest)

    def forget(self, request: Request) -> None:
        """Account for a request that was just marked as dropped."""
        name, digest = request.submit.tenant, request.submit.digest
        tenant = self._tenants[name]
        queue = tenant.queues[digest]
        was_head = queue.heap[0][2] is request
        queue.forget_one()
        if queue.num_live == 0:
            self._close(name, digest)
        elif was_head:
            tenant.note_head(digest)

    def take_out(self, digest: str) -> list[Request]:
        """Remove and return all requests for an adapter."""
        taken: list[Request] = []
        for name in tuple(self._waiting.get(digest, ())):
            taken += [item[2] for item in self._tenants[name].queues[digest].heap if not item[2].dropped]
            self._close(name, digest)
        return taken

    def _close(self, name: str, digest: str) -> None:
        tenant = self._tenants[name]
        del tenant.queues[digest]
        if not tenant.queues:
            del self._tenants[name]
        tenants = self._waiting[digest]
        tenants.discard(name)
        if not tenants:
            del self._waiting[digest]

    def scan(
        self, offer: Offer, *, slack: float, max_refused: int, gives_way: Callable[[str], bool] = _nobody
    ) -> float | None:
        """Offer requests by their tenants' counters until no worker takes more.

        A tenant more than `slack` above one whose request was held is not served before it: the held request is
        then offered once more, and may not be held any more. Where there is no more room for tenants that give way
        they are passed over.
        Returns None when every request was refused or no worker takes more; else, when it stopped after
        `max_refused` offers or a tenant had more queues than are looked at, the counter up to which it may go on
        with `scan_adapters`.
        """
        looked_at_all = True
        aside: list[tuple[float, int, str]] = []  # tenants of which nothing was placed
        held: deque[tuple[float, Request]] = deque()  # by counter
        barred = False
        while max_refused > 0 and (top := self._top()) is not None:
            counter, _, name = top
            if held and counter > held[0][0] + slack:
                level, request = held.popleft()
                verdict = self._offer(offer, request, True, level)
            elif barred and gives_way(name):
                aside.append(heappop(self._heap))
                continue
            else:
                tenant = self._tenants[name]
                verdict, request, num_refused = self._visit(tenant, offer, held[0][0] if held else None)
                max_refused -= num_refused
                looked_at_all = looked_at_all and (
                    verdict in (Verdict.PLACED, Verdict.BARRED) or len(tenant.queues) <= MAX_QUEUES_PER_VISIT
                )
                if verdict in (Verdict.HELD, Verdict.BLOCKED, Verdict.BARRED):
                    aside.append(heappop(self._heap))
                if verdict is Verdict.HELD and request is not None:
                    held.append((counter, request))
            if verdict is Verdict.BARRED and not barred:
                barred = True
                if all(map(gives_way, self._tenants)):
                    verdict = Verdict.FULL
            if verdict is Verdict.FULL:
                looked_at_all = True
                break
        else:
            looked_at_all = looked_at_all and max_refused > 0
        for entry in aside:
            heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._tenants) + 16:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapify(self._heap)
        if looked_at_all:
            return None
        return held[0][0] + slack if held else math.inf

    def scan_adapters(
        self,
        digests: Collection[str],
        offer: Offer,
        max_counter: float,
        gives_way: Callable[[str], bool] = _nobody,
    ) -> int:
        """Offer requests for these adapters alone, by counter up to `max_counter`, until one is refused.

        Finds work for a worker whose adapters are those of requests far back. Returns how many were placed.
        """
        few, many = sorted((digests, self._waiting), key=len)
        num_placed, barred = 0, False
        queues = [(digest, name) for digest in few if digest in many for name in self._waiting[digest]]
        heads: list[tuple[float, int, int, str, str]] = []
        for digest, name in queues:
            head = self._tenants[name].queues[digest].head()
            if head is not None and self._counters[name] <= max_counter:
                heads.append((self._counters[name], *head.sort_key, digest, name))
        heapify(heads)
        while heads and heads[0][0] <= max_counter:
            counter, deadline, order, digest, name = heads[0]
            if counter < self._counters[name]:
                heapreplace(heads, (self._counters[name], deadline, order, digest, name))
                continue
            head = self._tenants[name].queues[digest].head()
            # What is passed over was not looked at, so this must not raise the level of service.
            if head is None:
                break
            if barred and gives_way(name):
                heappop(heads)
                continue
            verdict = self._offer(offer, head, False, 0.0)
            if verdict is Verdict.BARRED:
                barred = True
                continue
            if verdict is not Verdict.PLACED:
                break
            num_placed += 1
            tenant = self._tenants.get(name)
            queue = tenant.queues.get(digest) if tenant else None
            head = queue.head() if queue else None
            if head is None:
                heappop(heads)
            else:
                heapreplace(heads, (self._counters[name], *head.sort_key, digest, name))
        return num_placed

    def _top(self) -> tuple[float, int, str] | None:
        """Return the tenant with the least counter, after putting outdated entries right."""
        while self._heap:
            entry = self._heap[0]
            if not self._is_current(entry):
                heappop(self._heap)
            elif entry[0] < self._counters[entry[2]]:
                heapreplace(self._heap, (self._counters[entry[2]], *entry[1:]))
            else:
                return entry
        return None

    def _is_current(self, entry: tuple[float, int, str]) -> bool:
        tenant = self._tenants.get(entry[2])
        return tenant is not None and tenant.token == entry[1]

    def _visit(self, tenant: _Tenant, offer: Offer, least_held: float | None) -> tuple[Verdict, Request | None, int]:
        """Offer the heads of a tenant's queues until one is placed.

        Returns the verdict, the first one held if none was placed, and how many were refused.
        """
        seen: list[Request] = []
        held: Request | None = None
        verdict = Verdict.BLOCKED
        while len(seen) < MAX_QUEUES_PER_VISIT and (request := tenant.pop_head()) is not None:
            seen.append(request)
            verdict = self._offer(offer, request, False, least_held)
            if verdict in (Verdict.PLACED, Verdict.FULL, Verdict.BARRED):
                break
            if verdict is Verdict.HELD and held is None:
                held = request
        for request in seen:
            if not request.dropped:
                heappush(tenant.order, (*request.sort_key, request.submit.digest))
        if held is not None and verdict is Verdict.BLOCKED:
            verdict = Verdict.HELD
        return verdict, held, len(seen) - (verdict in (Verdict.PLACED, Verdict.BARRED))

    def _offer(self, offer: Offer, request: Request, final: bool, least_held: float | None) -> Verdict:
        if request.dropped:
            return Verdict.BLOCKED
        tenant = request.submit.tenant
        counter = self._counters[tenant]
        verdict = offer(request, final)
        if verdict is Verdict.PLACED:
            self._counters.serve(tenant, counter, least_held)
        return verdict


class Backlog:
    """All queued requests."""

    def __init__(self, counters: TokenCounters) -> None:
        self._counters = counters
        self._last_tenant = ""
        self._lanes = {(cls, warm): Lane(counters) for cls in CLASSES for warm in (True, False)}
        self._warm = {BASE}
        self.resumed: dict[str, Request] = {}
        """Requests that a worker has had before, oldest first."""
        self.num_queued = 0
        self.num_tokens = 0
        self.by_class: Counter[str] = Counter()
        self.by_digest: Counter[str] = Counter()

    def lane(self, cls: str, warm: bool) -> Lane:
        return self._lanes[cls, warm]

    def push(self, request: Request) -> None:
        """Queue a request. One that was removed comes back as a copy: containers may still hold the old object."""
        assert not request.dropped
        if self.num_queued == 0:
            self._counters.rise_to(self._last_tenant)
        self.num_queued += 1
        self.by_class[request.submit.cls] += 1
        self.by_digest[request.submit.digest] += 1
        self.num_tokens += _max_tokens(request)
        if request.resumed:
            self.resumed[request.rid] = request
        else:
            self._lane_of(request).push(request)

    def remove(self, request: Request) -> None:
        """Take a queued request out: it was dispatched, or has ended."""
        request.dropped = True
        self._last_tenant = request.submit.tenant
        self.num_queued -= 1
        self.by_class[request.submit.cls] -= 1
        decrement(self.by_digest, request.submit.digest)
        self.num_tokens -= _max_tokens(request)
        if self.resumed.pop(request.rid, None) is None:
            self._lane_of(request).forget(request)

    def set_warm(self, digest: str, warm: bool) -> None:
        """Note that an adapter is on some worker now, or on none any more."""
        if digest == BASE or self.is_warm(digest) == warm:
            return
        (self._warm.add if warm else self._warm.discard)(digest)
        for cls in CLASSES:
            for request in self._lanes[cls, not warm].take_out(digest):
                self._lanes[cls, warm].push(request)

    def is_warm(self, digest: str) -> bool:
        return digest in self._warm

    def _lane_of(self, request: Request) -> Lane:
        return self._lanes[request.submit.cls, self.is_warm(request.submit.digest)]


def _max_tokens(request: Request) -> int:
    return request.submit.num_prompt_tokens + request.submit.max_new_tokens
