"""The scheduler without a queue or a clock: it receives messages and returns assignments. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import islice

from protocol.wire import messages as m
from protocol.wire.keys import BATCH, CLASSES, INTERACTIVE
from scheduler.backlog import Backlog, BaseQueues, FairQueue, Offer, OfferResult, Yields
from scheduler.config import SchedulerConfig
from scheduler.fairness import FairShares, VirtualTokenCounters
from scheduler.ledger import Ledger
from scheduler.placement import Placement
from scheduler.request import BASE, QueuedRequest
from scheduler.scale_in import Popularity, least_valuable
from scheduler.swap_orders import SwapOrders
from scheduler.swaps import SwapPolicy
from scheduler.workers import Worker, Workers

MAX_REFUSED = 32
"""Refused requests after which a scan of a fair queue stops; `scan_adapters` finds requests further back."""

MAX_PLACED = 512
"""Maximum number of requests that one plan assigns, so that other tasks can run before the next plan."""

MAX_OPTIONS = 4
"""Maximum number of workers that a request's record lists with their estimated waits."""

TIERS = ("resident", "loading", "host", "store")
"""Names of the values of `workers.Tier`, in order."""

PREFETCH_AGAIN_MS = 10_000
"""Minimum ms between two prefetch orders for one adapter."""

MAX_QUEUED_DIGESTS = 1024
"""Maximum number of adapters with queued requests in one message to a worker."""


@dataclass(slots=True)
class DispatchPlan:
    """What to do now. The requests of `batches` count as assigned from here on; `Scheduler.undo` reverts that."""

    batches: dict[str, list[QueuedRequest]] = field(default_factory=dict[str, list[QueuedRequest]])
    """Worker -> requests to assign to it, of any adapters."""
    prefetches: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """(worker, adapter) pairs: the worker should fetch the adapter ahead of requests."""
    queued: list[tuple[str, list[str]]] = field(default_factory=list[tuple[str, list[str]]])
    """(worker, those of its resident adapters that queued requests need)."""
    num_placed: int = 0
    again_ms: float | None = None
    """Unix ms when another plan may place more even without new events; None: no such time."""


class Scheduler:
    """All decisions: which request runs on which worker, which workers are dead, which requests have expired.

    Times are in ms; `now_ms` is unix time, like deadlines. No method waits or fails.
    """

    def __init__(self, config: SchedulerConfig, counters: VirtualTokenCounters | None = None) -> None:
        self.config = config
        self.counters = counters or VirtualTokenCounters(config.max_lag)
        self.workers = Workers(config.beat_timeout_s)
        self.placement = Placement(self.workers, config.max_attempts)
        self.ledger = Ledger(self.workers, self.counters, self.placement.rank_of)
        self.backlog = Backlog(self.counters)
        self.popularity = Popularity()
        self.swaps = SwapOrders(self.workers, SwapPolicy(config.max_swap_wait_s, config.min_residency_s))
        self._shares: dict[str, FairShares] = {}  # by base: shares of the slots of its workers
        self.takes_batch = True
        """Whether requests of class batch are dispatched. Their answers stay in the queue, whose memory may be short.
        """
        self.requests: dict[str, QueuedRequest] = {}
        self._deadlines: list[tuple[int, str]] = []
        self._alone_since_ms: dict[str, float] = {}  # base with requests but no worker -> unix ms since when
        self._num_seen = 0
        self._now_ms = 0.0  # time of the last plan
        self._unplaced: dict[str, str] = {}  # digest of requests submitted since the last plan -> base
        self._wanted: list[tuple[str, str]] = []  # (worker, adapter) of new homes
        self._prefetched: dict[str, float] = {}  # adapter -> unix ms of the last prefetch order
        self._queued: dict[str, frozenset[str]] = {}  # worker -> adapters last sent to it as needed by queued requests
        self._queued_changes: list[tuple[str, list[str]]] = []  # changes of `_queued` to send

    # ------------------------------------------------------------ events

    def submit(self, sub: m.RequestHead, epoch: int, attempts: int = 0) -> None:
        """Queue a request, new or handed back. For a known request, an epoch that is not newer is a repetition."""
        known = self.requests.get(sub.rid)
        request = QueuedRequest(sub, epoch, attempts, output_charged=-1 if epoch else 0)
        if known is not None:
            if epoch <= known.epoch:
                return
            self._take_out(known)
            request.input_charged, request.output_charged = known.input_charged, known.output_charged
        else:
            self._open(request)
        self._enqueue(request)
        if sub.digest != BASE and sub.digest not in self.workers.holders:
            self._unplaced[sub.digest] = sub.base

    def adopt(self, wid: str, sub: m.RequestHead, epoch: int, attempts: int, *, yields: bool = False) -> None:
        """Take over a request that an earlier leader assigned. epoch, yields: those of the assignment."""
        worker = self.workers.by_id.get(wid)
        if worker is None or sub.rid in self.requests:
            return
        request = QueuedRequest(
            sub,
            epoch - 1,
            attempts,
            dropped=True,
            input_charged=True,
            output_charged=-1,
            yields=yields,
        )
        self.requests[sub.rid] = request
        self._open(request)
        self.ledger.assign(request, worker)

    def ended(self, message: m.Ended) -> None:
        """Record that a request has left its worker, or the queue. Messages of earlier owners are ignored."""
        request = self.requests.get(message.rid)
        if request is not None and not message.wid and not request.wid:
            self.forget(message.rid)
            return
        if request is None or request.wid != message.wid or request.epoch + 1 != message.epoch:
            return
        self._close(request)
        self.ledger.end(request, message.num_output_tokens)

    def forget(self, rid: str) -> None:
        """Drop a request that has ended elsewhere."""
        request = self.requests.get(rid)
        if request is not None:
            self._close(request)
            self._take_out(request)

    def beats(self, beats: Mapping[str, m.WorkerBeat | None], elapsed_s: float) -> list[str]:
        """Process workers' heartbeats, `elapsed_s` after the last call. Returns dead workers, see `Workers.observe`."""
        dead = self.workers.observe(beats, elapsed_s)
        for worker in self.workers.by_id.values():
            if worker.silent_s == 0.0:
                self.ledger.observe(worker)
        return dead

    def set_bases(self, names: Sequence[str], failed: Collection[str] = ()) -> None:
        """Set the names of the fleet's bases, and of those that failed to start."""
        self.swaps.noted = set(failed)
        self.workers.set_bases(names)

    @property
    def waits_for_loads(self) -> bool:
        """Whether cold requests are queued while some worker is loading adapters."""
        return self.backlog.has_cold and any(worker.cold for worker in self.workers.available())

    def tick(self) -> None:
        """Adapt to the load of each adapter. Must be called once a second."""
        self.placement.refresh()
        self._wanted = self.placement.tick(self.backlog.by_digest)
        queued = {wid: self._queued_at(worker) for wid, worker in self.workers.by_id.items()}
        self._queued_changes = [
            (wid, sorted(d)) for wid, d in queued.items() if d != self._queued.get(wid, frozenset())
        ]
        self._queued = queued

    def _queued_at(self, worker: Worker) -> frozenset[str]:
        """Return a worker's resident adapters that queued requests need, which it should keep."""
        wanted = (digest for digest in worker.resident if self.backlog.by_digest.get(digest))
        return frozenset(islice(wanted, MAX_QUEUED_DIGESTS))

    # ------------------------------------------------------------ decisions

    def plan(self, now_ms: float) -> DispatchPlan:
        """Decide which requests to dispatch now, and which adapters to prefetch."""
        plan = DispatchPlan()
        self._now_ms = now_ms
        for digest, warm in self.workers.take_moved().items():
            self.backlog.set_warm(digest, warm)
        if self.backlog.num_queued:
            self.placement.refresh()
            self.backlog.drop_empty()
            for base, queues in self.backlog.by_base.items():
                self._dispatch(base, queues, plan, now_ms)
            self._prefetch(plan, now_ms)
        self._unplaced.clear()
        plan.prefetches += self._wanted
        self._wanted = []
        plan.queued, self._queued_changes = self._queued_changes, []
        return plan

    def undo(self, requests: Iterable[QueuedRequest], ended: Iterable[str] = ()) -> None:
        """Return requests of an unassigned batch to the backlog. ended: ids of requests to forget instead."""
        gone = set(ended)
        for request in requests:
            if self.requests.get(request.rid) is not request or not request.wid:
                continue  # a newer epoch is known by now
            self.ledger.remove(request)
            if request.rid in gone:
                self._close(request)
            else:
                self._enqueue(replace(request, dropped=False))

    def expired(self, now_ms: float) -> list[str]:
        """Return the ids of requests whose deadline has passed, each once."""
        rids: list[str] = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            _, rid = heappop(self._deadlines)
            if rid in self.requests:
                rids.append(rid)
        if len(self._deadlines) > 2 * len(self.requests) + 1024:
            self._deadlines = sorted((r.submit.deadline_ms, rid) for rid, r in self.requests.items())
        return rids

    def unserved(self, now_ms: float) -> list[str]:
        """Return the ids of requests with a waiting gateway for which no worker of their base has come in time.

        Jobs, for which no gateway waits, are not included. Time counts from the end of the last worker or from the
        request's submission, whichever is later.
        """
        base_of, bases = self.workers.base_of, [worker.beat.base for worker in self.workers.by_id.values()]
        served = set(map(base_of, [*bases, *self.swaps.reachable().keys() - self.swaps.failed()]))
        alone = [base for base, queues in self.backlog.by_base.items() if queues.num and base_of(base) not in served]
        if not alone or not self.config.wait_for_worker_s:
            self._alone_since_ms = {}
            return []
        self._alone_since_ms = {base: self._alone_since_ms.get(base, now_ms) for base in alone}
        before_ms = now_ms - 1000 * self.config.wait_for_worker_s
        late = {base for base, since_ms in self._alone_since_ms.items() if since_ms <= before_ms}
        if not late:
            return []
        return [
            rid
            for rid, r in self.requests.items()
            if r.submit.base in late and r.submit.gateway and r.submit.submitted_ms <= before_ms
        ]

    def hopeless(self) -> list[tuple[str, str]]:
        """Return (id, base) of the unassigned requests that cannot run.

        Those are the requests of removed bases, and those with a waiting gateway whose base workers might become, but
        cannot.
        """
        removed, failed = self.workers.removed, self.swaps.failed() & self.swaps.reachable().keys()
        if not any(queues.num for base, queues in self.backlog.by_base.items() if base in removed | failed):
            return []
        waiting = [one for one in self.requests.values() if not one.wid and one.submit.base in removed | failed]
        return [(one.rid, one.submit.base) for one in waiting if one.submit.gateway or one.submit.base in removed]

    def bases(self) -> dict[str, m.BaseLoad]:
        """Return the load of each base by name: its workers and requests, and how many workers may become it.

        A base without any of these is left out.
        """
        counts = {base: [0, queues.num, 0, 0] for base, queues in self.backlog.by_base.items() if queues.num}
        for worker in self.workers.by_id.values():
            count = counts.setdefault(worker.beat.base, [0, 0, 0, 0])
            count[0] += worker.available
            count[2] += worker.load
        for base, num in self.swaps.reachable().items():
            counts.setdefault(base, [0, 0, 0, 0])[3] = num
        return {base: m.BaseLoad(*count) for base, count in counts.items() if base}

    def of_gateway(self, gid: str) -> list[str]:
        """Return the ids of the requests that end when a gateway dies."""
        return [rid for rid, r in self.requests.items() if r.submit.gateway == gid and not r.submit.stored]

    def oldest_ms(self) -> dict[str, int]:
        """Return class -> unix ms when its oldest unassigned request was submitted; classes without one are missing."""
        oldest: dict[str, int] = {}
        for request in self.requests.values():
            sub = request.submit
            if not request.wid and sub.submitted_ms < oldest.get(sub.cls, 1 << 62):
                oldest[sub.cls] = sub.submitted_ms
        return oldest

    def placed(self, request: QueuedRequest, wid: str, now_ms: int) -> m.Placed:
        """Return the record of why a request is assigned to a worker."""
        choice = request.choice
        options = [choice.chosen] if choice is not None else []
        if choice is not None:
            others = sorted(choice.candidates, key=lambda one: one.wait_ms)
            options += [one for one in others if one is not choice.chosen][: MAX_OPTIONS - 1]
        held_ms = now_ms - request.held_since_ms if request.held_since_ms >= 0 else 0
        lead = self.counters[request.submit.tenant] - self.counters.level
        return m.Placed(
            now_ms,
            wid,
            choice.because if choice is not None else "",
            [
                m.Option(one.name, round(one.wait_ms), TIERS[one.tier] if request.submit.digest else "", one.crowded)
                for one in options
            ],
            len(choice.candidates) - len(options) if choice is not None else 0,
            round(held_ms),
            request.yields and not request.alone,
            round(lead),
            self.backlog.num_queued,
        )

    def drain_next(self, now_ms: float) -> str:
        """Return the name of the worker whose removal costs the others least, "" if there is none.

        The last worker of a base is kept as long as another base has two.
        """
        placement, workers = self.placement, list(self.workers.available())
        num = Counter(worker.beat.base for worker in workers)
        return least_valuable(
            [worker for worker in workers if num[worker.beat.base] > 1] or workers,
            lambda digest: self.popularity.of(digest, now_ms),
            placement.facts_of,
            placement.bandwidths,
        )

    def assigned_to(self, wid: str) -> list[str]:
        """Return the ids of the requests assigned to a worker."""
        worker = self.workers.by_id.get(wid)
        return list(worker.requests) if worker else []

    def is_assigned_to(self, rid: str, wid: str) -> bool:
        """Return whether a request is assigned to a worker."""
        request = self.requests.get(rid)
        return request is not None and request.wid == wid

    def unlisted(self) -> dict[str, int]:
        """Return id -> epoch of assigned requests that their live worker's heartbeat does not list."""
        found: dict[str, int] = {}
        for worker in self.workers.by_id.values():
            if worker.silent_s:
                continue
            for rid in worker.requests.keys() - {rid for rid, _ in worker.beat.progress}:
                found[rid] = self.requests[rid].epoch + 1
        return found

    def remove_worker(self, wid: str) -> None:
        """Forget a dead worker, after its requests have been requeued or ended in the queue."""
        for rid in self.assigned_to(wid):
            self.ledger.remove(self.requests[rid])
        self.workers.remove(wid)

    # ------------------------------------------------------------ helpers

    def shares(self, base: str) -> FairShares:
        """Return how the slots of a base's workers are shared. A tenant has one counter for all bases."""
        shares = self._shares.get(base)
        if shares is None:
            self._shares = {name: one for name, one in self._shares.items() if one.num_open}
            shares = self._shares[base] = FairShares(self.counters, self.config.slack_tokens)
        return shares

    def _open(self, request: QueuedRequest) -> None:
        heappush(self._deadlines, (request.submit.deadline_ms, request.rid))
        self._share(request)

    def _share(self, request: QueuedRequest) -> None:
        if request.submit.cls != BATCH:
            self.shares(request.submit.base).opened(request.submit.tenant, request.submit.weight, self._now_ms)

    def _close(self, request: QueuedRequest) -> None:
        del self.requests[request.rid]
        if request.submit.cls != BATCH:
            self.shares(request.submit.base).closed(request.submit.tenant)

    def _enqueue(self, request: QueuedRequest) -> None:
        self._num_seen += 1
        request.order = self._num_seen
        self.requests[request.rid] = request
        self.backlog.push(request)

    def _take_out(self, request: QueuedRequest) -> None:
        if request.wid:
            self.ledger.remove(request)
        elif not request.dropped:
            self.backlog.remove(request)

    def _dispatch(self, base: str, queues: BaseQueues, plan: DispatchPlan, now_ms: float) -> None:
        """Dispatch requests of one base."""
        group, shares = self.placement.group(base), self.shares(base)
        shares.update(group.capacity, group.num_reserved, now_ms)

        def offer(request: QueuedRequest, final: bool) -> OfferResult:
            return self._offer(request, final, shares, plan, now_ms)

        classes = CLASSES if self.takes_batch else (INTERACTIVE,)
        for cls in classes:
            self._offer_resumed(queues.resumed[cls], offer)
        for cls in classes:
            for warm in (True, False):
                if queue := queues.fair[cls, warm]:
                    self._scan(queue, base, cls, offer, shares.tenant_yields, warm=warm)

    def _offer_resumed(self, requests: Mapping[str, QueuedRequest], offer: Offer) -> None:
        """Offer requests of one class that a worker has had before."""
        offers_left = {True: MAX_PLACED, False: MAX_PLACED}  # by warm or cold; 0 once no worker takes more
        for request in list(requests.values()):
            if not any(offers_left.values()):
                break
            warm = self.backlog.is_warm(request.submit.digest)
            if offers_left[warm]:
                offers_left[warm] -= 1
                if offer(request, True) in (OfferResult.FULL, OfferResult.FULL_FOR_YIELDING):
                    offers_left[warm] = 0

    def _scan(self, queue: FairQueue, base: str, cls: str, offer: Offer, yields: Yields, *, warm: bool) -> None:
        """Offer the requests of one fair queue."""
        max_counter = queue.scan(offer, slack=self.config.slack_tokens, max_refused=MAX_REFUSED, yields=yields)
        if warm and max_counter is not None:
            for worker in self.placement.with_room(base, cls):
                queue.scan_adapters(worker.resident, offer, max_counter, yields)

    def _offer(
        self, request: QueuedRequest, final: bool, shares: FairShares, plan: DispatchPlan, now_ms: float
    ) -> OfferResult:
        """Assign a request if a worker may take it. final: do not hold it for a better worker."""
        if plan.num_placed >= MAX_PLACED:
            plan.again_ms = now_ms
            return OfferResult.FULL
        request.yields = shares.yields(request)
        request.alone = request.yields and shares.is_alone(request.submit.tenant)
        if request.yields and not self.placement.has_room(request):
            others_have_room = self.placement.has_room(request, yields=False)
            return OfferResult.FULL_FOR_YIELDING if others_have_room else OfferResult.FULL
        output_tokens = min(request.submit.max_new_tokens, self.ledger.mean_output_tokens)
        choice = self.placement.choose(request, output_tokens, now_ms, final=final)
        if isinstance(choice, Worker):
            self._assign(request, choice, plan, now_ms)
            return OfferResult.PLACED
        if choice is OfferResult.HELD:
            until_ms = request.held_until_ms
            plan.again_ms = until_ms if plan.again_ms is None else min(plan.again_ms, until_ms)
        elif not self.placement.has_room(request):
            return OfferResult.FULL
        return choice

    def _assign(self, request: QueuedRequest, worker: Worker, plan: DispatchPlan, now_ms: float) -> None:
        self.backlog.remove(request)
        self.ledger.assign(request, worker)
        self.placement.note_assigned(request, worker, now_ms)
        if request.submit.digest != BASE:
            self.popularity.note(request.submit.digest, now_ms)
        plan.batches.setdefault(worker.wid, []).append(request)
        plan.num_placed += 1

    def _prefetch(self, plan: DispatchPlan, now_ms: float) -> None:
        """Order workers to fetch the adapters of requests that are new and could not be dispatched."""
        for digest, base in self._unplaced.items():
            if not self.backlog.by_digest[digest] or digest in self.workers.holders:
                continue
            if now_ms - self._prefetched.get(digest, -PREFETCH_AGAIN_MS) < PREFETCH_AGAIN_MS:
                continue
            wid = self.placement.home(base, digest)
            if wid is not None:
                self._prefetched[digest] = now_ms
                plan.prefetches.append((wid, digest))
        if len(self._prefetched) > 10_000:
            self._prefetched = {d: ms for d, ms in self._prefetched.items() if now_ms - ms < PREFETCH_AGAIN_MS}
