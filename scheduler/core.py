"""The scheduler without a queue or a clock: messages in, assignments out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import islice

from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.keys import BATCH, CLASSES
from scheduler.backlog import Backlog, Verdict
from scheduler.fairness import Shares, TokenCounters
from scheduler.fleet import Fleet, Worker
from scheduler.ledger import Ledger
from scheduler.placement import AdapterFacts, Placement
from scheduler.request import BASE, Request

MAX_REFUSED = 32
"""Requests that find no worker before a scan of a lane stops. What is further back is found by its adapter."""

MAX_PLACED = 512
"""Requests of one plan; the rest comes with the next, so that the loop can breathe."""

PREFETCH_AGAIN_MS = 10_000
MAX_QUEUED_TOLD = 1024
"""Adapters that a worker is told are waited for."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What can be set of the scheduler's behaviour."""

    slack_tokens: float = 4096.0
    max_attempts: int = 3
    beat_timeout_s: float = 3.5

    @property
    def max_lag(self) -> float:
        """How far a tenant whose requests could not run may be behind the others, in tokens."""
        return 4 * self.slack_tokens

    @classmethod
    def of(cls, settings: Settings) -> Policy:
        return cls(float(settings.affinity_slack_tokens), settings.max_attempts, settings.beat_timeout_s)


@dataclass(slots=True)
class Plan:
    """What to do now. The requests of `batches` count as assigned from here on; `Scheduler.undo` takes that back."""

    batches: dict[str, list[Request]] = field(default_factory=dict)  # wid -> requests, of any adapters
    prefetches: list[tuple[str, str]] = field(default_factory=list)  # (wid, digest) worth fetching ahead
    queued: list[tuple[str, list[str]]] = field(default_factory=list)  # (wid, adapters there that requests wait for)
    num_placed: int = 0
    again_ms: float | None = None  # when the next plan may find more, without anything else happening


class Scheduler:
    """All decisions: which request runs where, who is dead, what has expired.

    Times are given in ms; wall clock for `now_ms`, since deadlines are. No method waits or fails.
    """

    def __init__(self, policy: Policy, counters: TokenCounters | None = None) -> None:
        self.policy = policy
        self.counters = counters or TokenCounters(policy.max_lag)
        self.fleet = Fleet(policy.beat_timeout_s)
        self.placement = Placement(self.fleet, policy.max_attempts)
        self.ledger = Ledger(self.fleet, self.counters, self.placement.rank_of)
        self.backlog = Backlog(self.counters)
        self.shares = Shares(self.counters, policy.slack_tokens)
        self.requests: dict[str, Request] = {}
        self._deadlines: list[tuple[int, str]] = []
        self._num_seen = 0
        self._now_ms = 0.0  # of the last plan
        self._unplaced: set[str] = set()  # digests of requests submitted since the last plan
        self._wanted: list[tuple[str, str]] = []  # (wid, digest) of new homes
        self._prefetched: dict[str, float] = {}  # digest -> when, ms
        self._queued: dict[str, frozenset[str]] = {}  # wid -> adapters it was told that requests wait for
        self._queued_news: list[tuple[str, list[str]]] = []

    # ------------------------------------------------------------ what happened

    def submit(self, sub: m.Submit, epoch: int, attempts: int = 0) -> None:
        """Queue a request, new or handed back. An older or equal epoch of a known one is a repetition."""
        known = self.requests.get(sub.rid)
        request = Request(sub, epoch, attempts, output_charged=-1 if epoch else 0)
        if known is not None:
            if epoch <= known.epoch:
                return
            self._take_out(known)
            request.input_charged, request.output_charged = known.input_charged, known.output_charged
        else:
            self._count_in(sub)
        self._enqueue(request)
        if sub.digest != BASE and sub.digest not in self.fleet.holders:
            self._unplaced.add(sub.digest)

    def adopt(self, wid: str, sub: m.Submit, epoch: int, attempts: int, *, over_share: bool = False) -> None:
        """Take over a request that an earlier leader assigned; `epoch` and `over_share` are those of the assignment."""
        worker = self.fleet.workers.get(wid)
        if worker is None or sub.rid in self.requests:
            return
        request = Request(
            sub, epoch - 1, attempts, dropped=True, input_charged=True, output_charged=-1, over_share=over_share
        )
        self.requests[sub.rid] = request
        self._count_in(sub)
        self.ledger.assign(request, worker)

    def ended(self, message: m.Ended) -> None:
        """Settle a request that left its worker, or the queue. Messages of earlier owners change nothing."""
        request = self.requests.get(message.rid)
        if request is not None and not message.wid and not request.wid:
            self.forget(message.rid)
            return
        if request is None or request.wid != message.wid or request.epoch + 1 != message.epoch:
            return
        self._count_out(request)
        self.ledger.end(request, message.num_output_tokens)

    def forget(self, rid: str) -> None:
        """Drop a request that has ended elsewhere."""
        request = self.requests.get(rid)
        if request is not None:
            self._count_out(request)
            self._take_out(request)

    def beats(self, beats: Mapping[str, m.WorkerBeat | None], elapsed_s: float) -> list[str]:
        """Take the workers' latest beats, `elapsed_s` after the last ones. Returns who is dead, see `Fleet.observe`."""
        dead = self.fleet.observe(beats, elapsed_s)
        for worker in self.fleet.workers.values():
            if worker.silent_s == 0.0:
                self.ledger.observe(worker)
        return dead

    def learn(self, digest: str, facts: AdapterFacts) -> None:
        """Take what the catalogue says of an adapter."""
        self.placement.facts[digest] = facts

    def tick(self) -> None:
        """Once a second: follow the load of adapters."""
        self.placement.begin()
        self._wanted = self.placement.tick(self.backlog.by_digest)
        queued = {wid: self._queued_at(worker) for wid, worker in self.fleet.workers.items()}
        self._queued_news = [(wid, sorted(d)) for wid, d in queued.items() if d != self._queued.get(wid, frozenset())]
        self._queued = queued

    def _queued_at(self, worker: Worker) -> frozenset[str]:
        """Return the adapters in a worker's pool that requests in the backlog wait for: they should not leave now."""
        return frozenset(islice((d for d in worker.resident if self.backlog.by_digest.get(d)), MAX_QUEUED_TOLD))

    # ------------------------------------------------------------ what to do

    def plan(self, now_ms: float) -> Plan:
        """Choose what to dispatch now."""
        plan = Plan()
        self._now_ms = now_ms
        for digest, warm in self.fleet.take_moved().items():
            self.backlog.set_warm(digest, warm)
        if self.backlog.num_queued:
            self.placement.begin()
            self.shares.begin(self.placement.total_capacity, self.placement.num_kept, now_ms)
            self._dispatch_resumed(plan, now_ms)
            for cls in CLASSES:
                for warm in (True, False):
                    self._dispatch_lane(cls, warm, plan, now_ms)
            self._prefetch(plan, now_ms)
        self._unplaced.clear()
        plan.prefetches += self._wanted
        self._wanted = []
        plan.queued, self._queued_news = self._queued_news, []
        return plan

    def undo(self, requests: Iterable[Request], ended: Iterable[str] = ()) -> None:
        """Put requests of a batch that was not assigned back on the backlog; forget those that have `ended`."""
        gone = set(ended)
        for request in requests:
            if self.requests.get(request.rid) is not request or not request.wid:
                continue  # something newer is known of it by now
            self.ledger.remove(request)
            if request.rid in gone:
                self._count_out(request)
            else:
                self._enqueue(replace(request, dropped=False))

    def expired(self, now_ms: float) -> list[str]:
        """Return the requests whose deadline has passed, each once."""
        rids: list[str] = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            _, rid = heappop(self._deadlines)
            if rid in self.requests:
                rids.append(rid)
        if len(self._deadlines) > 2 * len(self.requests) + 1024:
            self._deadlines = sorted((r.submit.deadline_ms, rid) for rid, r in self.requests.items())
        return rids

    def of_gateway(self, gid: str) -> list[str]:
        """Return the requests that die with a gateway."""
        return [rid for rid, r in self.requests.items() if r.submit.gateway == gid and not r.submit.stored]

    def assigned_to(self, wid: str) -> list[str]:
        """Return the requests that a worker has."""
        worker = self.fleet.workers.get(wid)
        return list(worker.requests) if worker else []

    def is_assigned_to(self, rid: str, wid: str) -> bool:
        """Tell whether a worker has a request."""
        request = self.requests.get(rid)
        return request is not None and request.wid == wid

    def unlisted(self) -> dict[str, int]:
        """Return assigned requests, and their epochs there, that their living worker's beat does not list."""
        found: dict[str, int] = {}
        for worker in self.fleet.workers.values():
            if worker.silent_s:
                continue
            for rid in worker.requests.keys() - {rid for rid, _ in worker.beat.progress}:
                found[rid] = self.requests[rid].epoch + 1
        return found

    def remove_worker(self, wid: str) -> None:
        """Forget a dead worker, after its requests have been requeued or ended in the queue."""
        for rid in self.assigned_to(wid):
            self.ledger.remove(self.requests[rid])
        self.fleet.remove(wid)

    # ------------------------------------------------------------ helpers

    def _count_in(self, sub: m.Submit) -> None:
        heappush(self._deadlines, (sub.deadline_ms, sub.rid))
        if sub.cls != BATCH:
            self.shares.asked(sub.tenant, sub.weight, self._now_ms)

    def _count_out(self, request: Request) -> None:
        del self.requests[request.rid]
        if request.submit.cls != BATCH:
            self.shares.ended(request.submit.tenant)

    def _enqueue(self, request: Request) -> None:
        self._num_seen += 1
        request.order = self._num_seen
        self.requests[request.rid] = request
        self.backlog.push(request)

    def _take_out(self, request: Request) -> None:
        if request.wid:
            self.ledger.remove(request)
        elif not request.dropped:
            self.backlog.remove(request)

    def _dispatch_resumed(self, plan: Plan, now_ms: float) -> None:
        full: set[bool] = set()  # for requests whose adapter is somewhere (True), or nowhere
        for request in list(self.backlog.resumed.values())[:MAX_PLACED]:
            warm = self.backlog.is_warm(request.submit.digest)
            if warm not in full and self._offer(request, True, plan, now_ms) is Verdict.FULL:
                full.add(warm)

    def _dispatch_lane(self, cls: str, warm: bool, plan: Plan, now_ms: float) -> None:
        lane = self.backlog.lane(cls, warm)
        if not lane:
            return

        def offer(request: Request, final: bool) -> Verdict:
            return self._offer(request, final, plan, now_ms)

        def gives_way(tenant: str) -> bool:
            return self.shares.gives_way(tenant, batch=cls == BATCH)

        slack = self.policy.slack_tokens
        max_counter = lane.scan(offer, slack=slack, max_refused=MAX_REFUSED, gives_way=gives_way)
        if warm and max_counter is not None:
            for worker in self.placement.with_room(cls):
                lane.scan_adapters(worker.resident, offer, max_counter, gives_way)

    def _offer(self, request: Request, final: bool, plan: Plan, now_ms: float) -> Verdict:
        if plan.num_placed >= MAX_PLACED:
            plan.again_ms = now_ms
            return Verdict.FULL
        sub = request.submit
        is_batch = sub.cls == BATCH
        request.over_share = not request.resumed and (is_batch or self.shares.is_over(sub.tenant))
        gives_way = request.gives_way = request.over_share and self.shares.gives_way(sub.tenant, batch=is_batch)
        if request.over_share and not self.placement.has_room(request, gives_way=gives_way, over_share=True):
            return Verdict.BARRED if gives_way and self.placement.has_room(request) else Verdict.FULL
        output_tokens = min(sub.max_new_tokens, self.ledger.mean_output_tokens)
        choice = self.placement.choose(request, output_tokens, now_ms, final=final)
        if isinstance(choice, Worker):
            self.backlog.remove(request)
            self.ledger.assign(request, choice)
            self.placement.took(request, choice, now_ms)
            plan.batches.setdefault(choice.wid, []).append(request)
            plan.num_placed += 1
            return Verdict.PLACED
        if choice is Verdict.HELD:
            until_ms = request.held_until_ms
            plan.again_ms = until_ms if plan.again_ms is None else min(plan.again_ms, until_ms)
        elif not self.placement.has_room(request):
            return Verdict.FULL
        return choice

    def _prefetch(self, plan: Plan, now_ms: float) -> None:
        """Have adapters brought near for requests that have just come and could not be dispatched."""
        for digest in self._unplaced:
            if not self.backlog.by_digest[digest] or digest in self.fleet.holders:
                continue
            if now_ms - self._prefetched.get(digest, -PREFETCH_AGAIN_MS) < PREFETCH_AGAIN_MS:
                continue
            wid = self.placement.home(digest)
            if wid is not None:
                self._prefetched[digest] = now_ms
                plan.prefetches.append((wid, digest))
        if len(self._prefetched) > 10_000:
            self._prefetched = {d: ms for d, ms in self._prefetched.items() if now_ms - ms < PREFETCH_AGAIN_MS}
