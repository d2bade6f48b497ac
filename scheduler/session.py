"""One leadership: passes messages from the queue to the pure scheduler, and its assignments back to the queue.

Five loops: `_read` feeds the `Scheduler` with submitted and ended requests, `_dispatch` assigns what it plans, `_watch`
checks heartbeats, deaths and deadlines, `_renew` renews the lease, and `_search` finds requests whose worker is
unknown. Requests that arrive while an assignment is written are assigned together next: batches grow under load, and an
idle queue adds no delay.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from heapq import nlargest

from protocol.metrics import series as metrics
from protocol.queue.books.audit import SCHEDULER, AuditEntry
from protocol.queue.bus import CONNECTION_ERRORS, Bus, Entry, decode, now_ms
from protocol.runtime.guarded import BRISK, Items, Loop, guarded
from protocol.runtime.release import RELEASE
from protocol.runtime.service import wait_any
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import DeadlineExceeded, NotFound, ProtocolError, Unavailable
from protocol.wire.keys import BATCH, CLASSES
from scheduler.backlog import TenantQueued
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.drain import DrainRate
from scheduler.fairness import VirtualTokenCounters
from scheduler.placement import AdapterFacts
from scheduler.recovery import Recovery
from scheduler.request import QueuedRequest
from scheduler.swap_orders import FAILED
from scheduler.swaps import Swap
from scheduler.trace import tell_placed

logger = logging.getLogger(__name__)

WATCH_S = 0.5
"""Seconds between checks of heartbeats and deadlines."""

LOADS_S = 0.1
"""Seconds between checks of heartbeats alone, while requests wait for adapters that are loading."""

SEARCH_AGAIN_S = 30.0
"""Seconds after a restart of the queue by which every write that was in flight has arrived."""

READ_BLOCK_MS = 1000
COALESCE_S = 0.003
"""Seconds between plans while requests are queued, so that busy workers do not cost one plan per ended request."""

GATEWAY_GRACE_S = 2.0
"""Seconds after which a gateway whose heartbeat has expired counts as dead."""

WORK_STREAM_TTL_S = 3600
"""TTL in seconds of a worker's streams after their last use."""

STATUS_TTL_MS = 5000
"""TTL in ms of the published status."""

MEMORY_ALARM = 0.8
"""Fraction of its memory limit above which operators are warned; from 0.9 on gateways refuse calls."""


MAX_TOLD = 64
"""Maximum length of each list of adapters and tenants in the status."""

DRAIN_ROUNDS = 10
"""Rounds of `_watch` between two selections of the worker to drain next, which compare thousands of adapters."""

SUMMED_AT_ONCE = 500
"""Requests summed up for the swap policy per iteration of the event loop."""

MEMORY_FOR_BATCH = 0.95
"""Fraction of the queue's memory limit up to which batch requests are dispatched: their answers stay for a day."""


class Deposed(Exception):
    """The lease has expired, and another scheduler may lead."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The leadership of this process. It ends `duration_ms` after its last renewal."""

    token: str  # identifies this leadership; every assignment carries it (fencing)
    candidate: str  # identifies this process
    duration_ms: int


class Session:
    """A leadership, from taking the lease to losing it."""

    def __init__(self, bus: Bus, settings: Settings, lease: Lease, counters: VirtualTokenCounters) -> None:
        self._bus = bus
        self._lease = lease
        self.scheduler = Scheduler(SchedulerConfig.of(settings), counters)
        self._recovery = Recovery(bus, self.scheduler, settings.max_attempts)
        self._last_ids: dict[str, bytes] = {}
        self._wake = asyncio.Event()
        self._assigning = asyncio.Lock()
        self._silent_gateways: dict[str, float] = {}
        self._drain = DrainRate()
        self._drain_next = ""  # name of the worker to remove first
        self._memory_is_short = False
        self._again_ms: float | None = None  # unix ms of the next plan without any event; None: no such time
        self._rounds = 0  # number of rounds of `_watch` so far
        self._watched_s = time.monotonic()  # when the last round began
        self._watched = Items("watch", max_tries=0, backoff=BRISK)

    def loops(self) -> list[Loop]:
        """Return the loops that run while this process leads.

        A lost connection ends the session, and so does any unexpected error of a loop that changes the scheduler's
        state. The next session, here or in a standby, starts from the state in the queue.
        """
        ends = (Deposed, *CONNECTION_ERRORS)
        return [
            Loop("submissions", self._read, 0.0, backoff=BRISK, ends=ends, max_failures=1),
            Loop("assignments", self._dispatch, 0.0, backoff=BRISK, ends=ends, max_failures=1),
            Loop("watch", self._watch, 0.0, backoff=BRISK, ends=ends),
            Loop("lease", self._renew, self._lease.duration_ms / 5000, backoff=BRISK, ends=ends, max_failures=4),
        ]

    async def run(self, stop: asyncio.Event) -> None:
        """Lead until `stop`. Raises Deposed, a connection error, or a group with the other errors that ended it."""
        self._last_ids = await self._recovery.rebuild()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(guarded(loop)) for loop in self.loops()]
                tasks.append(group.create_task(self._search()))
                await stop.wait()
                async with self._assigning:  # let a started assignment finish its write
                    for task in tasks:
                        task.cancel()
        except ExceptionGroup as group:
            if group.subgroup(Deposed):
                raise Deposed from group
            lost, other = group.split(CONNECTION_ERRORS)
            if other is not None or lost is None:
                raise
            raise ConnectionError(str(lost.exceptions[0])) from group

    # ------------------------------------------------------------ from the queue

    async def _read(self) -> None:
        """Wait for submitted and ended requests, and pass them to the scheduler."""
        keys = self._bus.keys
        found = await self._bus.streams.read(self._last_ids, block_ms=READ_BLOCK_MS)
        for entry in found.get(keys.ended, ()):
            try:
                for message in decode(entry[1][b"b"], list[m.Ended]):
                    self.scheduler.ended(message)
            except (ProtocolError, KeyError) as error:
                await self._bus.streams.reject(keys.ended, entry, repr(error))
        for cls in CLASSES:
            if entries := found.get(keys.sub(cls)):
                await self._take(cls, entries)
        if found:
            self._wake.set()

    async def _take(self, cls: str, entries: list[Entry]) -> None:
        submits: list[tuple[m.RequestHead, int, int]] = []
        for entry in entries:
            fields = entry[1]
            try:
                sub = decode(fields[b"b"], m.RequestHead)
                if sub.cls != cls:
                    raise ProtocolError(f"class {sub.cls!r} on the stream of {cls!r}")
                submits.append((sub, int(fields[b"e"]), int(fields.get(b"a", 0))))
            except (ProtocolError, KeyError, ValueError) as error:
                await self._recovery.reject(self._bus.keys.sub(cls), entry, repr(error))
        if any(sub.base not in self.scheduler.workers.bases for sub, _, _ in submits):
            await self._look_at_bases()  # added since the last check, or removed
        await self._learn({sub.digest: sub.base for sub, _, _ in submits})
        for sub, epoch, attempts in submits:
            self.scheduler.submit(sub, epoch, attempts)
            if epoch and (request := self.scheduler.requests.get(sub.rid)) is not None:
                request.since_ms = now_ms()

    async def _learn(self, bases: Mapping[str, str]) -> None:
        """Read rank and size of those adapters that are not known yet. bases: digest -> base."""
        new = self.scheduler.placement.unknown(bases)
        if not new:
            return
        for digest in new:
            self.scheduler.placement.learn(digest, AdapterFacts(base=bases[digest]))
        for record in (await self._bus.adapters.records(new)).values():
            self.scheduler.placement.learn(
                record.digest, AdapterFacts(record.rank, record.num_bytes, bases[record.digest])
            )

    # ------------------------------------------------------------ to the queue

    async def _dispatch(self) -> None:
        """Wait for an event, then plan and assign."""
        if self._again_ms is None:
            await self._wake.wait()
        else:
            await wait_any(self._wake, max(0.0, self._again_ms - now_ms()) / 1000)
        self._wake.clear()
        async with self._assigning:
            with metrics.PLAN_SECONDS.time():
                plan = self.scheduler.plan(now_ms())
            self._again_ms = plan.again_ms
            if len(plan.batches) == 1:
                ((wid, batch),) = plan.batches.items()
                await self._assign(wid, batch)
            elif plan.batches:
                async with asyncio.TaskGroup() as group:
                    for wid, batch in plan.batches.items():
                        group.create_task(self._assign(wid, batch))
        if self.scheduler.backlog.num_queued:
            await asyncio.sleep(COALESCE_S)
        controls = [(wid, m.Control(kind="prefetch", digest=digest)) for wid, digest in plan.prefetches]
        controls += [(wid, m.Control(kind="queued", digests=digests)) for wid, digests in plan.queued]
        if controls:
            await self._bus.streams.tell(controls)

    async def _assign(self, wid: str, batch: list[QueuedRequest]) -> None:
        """Write one assignment; requests that cannot be assigned return to the backlog."""
        now = now_ms()
        pairs = [(_assigned(request, now), request.epoch) for request in batch]
        placed = {request.rid: self.scheduler.placed(request, wid, now) for request in batch}
        status, stale = await self._bus.assign(wid, pairs, leader=self._lease.token, placed=placed)
        if status == "ok":
            _count(batch)
            for request in batch:
                tell_placed(request, placed[request.rid])
            return
        if status == "deposed":
            raise Deposed
        if status == "gone":
            # The worker was declared dead but is alive: recreate its streams; its next heartbeat makes it available.
            logger.warning("worker %s has no work stream", wid)
            self.scheduler.workers.set_unreachable(wid)
            await self._bus.streams.create(self._bus.keys.work(wid), WORK_STREAM_TTL_S)
            await self._bus.streams.create(self._bus.keys.ctl(wid), WORK_STREAM_TTL_S)
        self.scheduler.undo(batch, stale)
        self._wake.set()

    # ------------------------------------------------------------ watch

    async def _renew(self) -> None:
        """Renew the lease. Raises Deposed if it is lost, ConnectionError if the queue was restarted."""
        lease = self._lease
        if await self._bus.lead(lease.token, lease.candidate, lease.duration_ms) != lease.token:
            raise Deposed
        if await self._bus.restarted():  # redis-py may have reconnected silently; a new session reads the queue's state
            raise ConnectionError("the queue was restarted")

    async def _search(self) -> None:
        """Find orphaned requests. Only a restart of the queue causes them, and it begins a new session."""
        await self._recovery.find_orphans()
        await asyncio.sleep(SEARCH_AGAIN_S)
        await self._recovery.find_orphans()

    async def _watch(self) -> None:
        """Check heartbeats, deaths, deadlines and lost messages; publish the status; wait for the next round.

        A failed part does not prevent the others, and is repeated in a later round.
        """
        now, rounds = time.monotonic(), self._rounds
        elapsed_s, self._watched_s = min(now - self._watched_s, 2 * WATCH_S), now
        done = self._watched.run
        if rounds % 2 == 0:
            await done("bases", self._look_at_bases)
        await done("workers", partial(self._watch_workers, elapsed_s))
        await done("gateways", partial(self._watch_gateways, elapsed_s))
        await done("removed bases", self._empty_removed)
        for rid in self.scheduler.expired(now_ms()):
            await done(rid, partial(self._recovery.end, rid, DeadlineExceeded("the request's deadline has passed")))
        wait_s = self.scheduler.config.wait_for_worker_s
        for rid in self.scheduler.unserved(now_ms()):
            why = Unavailable(f"no worker joined within wait_for_worker_s, {wait_s:g} s")
            await done(rid, partial(self._recovery.end, rid, why))
        if rounds % 2 == 0:
            await done("swaps", self._watch_swaps)
            await done("status", self._publish_status)
        for rid, base in self.scheduler.hopeless():
            why = Unavailable("no worker is ready to serve its base, which did not start", code="base_failed")
            if base in self.scheduler.workers.removed:
                why = NotFound(f"the base `{base}` was removed", code="base_not_served")
            await done(rid, partial(self._recovery.end, rid, why))
        if rounds % 4 == 3:
            await done("lost messages", self._recovery.reconcile)
        self._rounds += 1
        self._wake.set()
        await self._pause()

    async def _pause(self) -> None:
        """Wait for the next round; meanwhile read heartbeats if a loaded adapter may unblock a request."""
        end_s = time.monotonic() + WATCH_S
        while (left_s := end_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, LOADS_S) if self.scheduler.requests else left_s)
            if left_s > LOADS_S and self.scheduler.waits_for_loads:
                await self._watch_workers(0.0)  # the round itself counts the elapsed time
                self._wake.set()

    async def _watch_workers(self, elapsed_s: float) -> None:
        beats = await self._bus.members.worker_beats()
        known = self.scheduler.workers.bases
        if any(beat is not None and beat.base not in known for beat in beats.values()):
            await self._look_at_bases()  # now, so that no base of a joined worker is missing
        for wid in self.scheduler.beats(beats, elapsed_s):
            # Not while an assignment is written: one to this worker would be deleted unread.
            async with self._assigning:
                await self._recovery.bury(wid)

    async def _look_at_bases(self) -> None:
        bases, failed = await self._bus.members.bases()
        self.scheduler.workers.removed = frozenset((await self._bus.added_bases.get()).removed)
        self.scheduler.set_bases([base.name for base in bases], failed)

    async def _watch_swaps(self) -> None:
        """Process the outcomes of swap orders to workers, and give new orders."""
        members = self._bus.members
        for order, outcome in self.scheduler.swaps.settle(now_ms()):
            metrics.SWAPS.labels(order.base, outcome).inc()
            if outcome == FAILED:
                await members.note_failure(order.base, f"worker {order.seat.name} exited during its start", keep=True)
                await self._bus.audit.note(_audited(order, "base_failed"))
        if (asked := self.scheduler.swaps.asked(self.scheduler.ledger.mean_output_tokens)) is None:
            return
        requests = list(self.scheduler.requests.values())
        for start in range(0, len(requests), SUMMED_AT_ONCE):
            asked.add(requests[start : start + SUMMED_AT_ONCE])
            await asyncio.sleep(0)
        if orders := self.scheduler.swaps.decide(now_ms(), asked):
            await self._renew()  # a deposed leader gives no orders
            await self._bus.streams.tell([(one.seat.wid, m.Control(kind="serve", base=one.base)) for one in orders])
            for order in orders:
                await self._bus.audit.note(_audited(order, "done"))

    async def _empty_removed(self) -> None:
        """Drain the workers of removed bases, and delete a base's records once it has no workers and requests.

        A worker that may become another base is not drained: it may be its fleet's only worker.
        """
        workers, swaps = self.scheduler.workers, self.scheduler.swaps
        leaving = [
            one.wid
            for one in workers.available()
            if one.beat.base in workers.removed and workers.removed.issuperset(one.beat.may_become)
        ]
        if leaving:
            await self._bus.streams.tell([(wid, m.Control(kind="drain")) for wid in leaving])
        if recorded := workers.removed.intersection({*workers.bases, *swaps.noted}):
            for name in recorded - self.scheduler.bases().keys():
                await self._bus.members.drop_base(name)

    async def _watch_gateways(self, elapsed_s: float) -> None:
        silent = self._silent_gateways
        for gid, alive in (await self._bus.members.gateways_alive()).items():
            if alive:
                silent.pop(gid, None)
                continue
            silent[gid] = silent.get(gid, 0.0) + elapsed_s
            if silent[gid] >= GATEWAY_GRACE_S:
                await self._recovery.cancel_gateway(gid)
                del silent[gid]

    async def _publish_status(self) -> None:
        scheduler = self.scheduler
        if self._rounds % DRAIN_ROUNDS == 0:
            self._drain_next = scheduler.drain_next(now_ms())
        scheduler.tick()
        self._drain.observe(time.monotonic(), scheduler.ledger.num_ended, scheduler.backlog.num_queued > 0)
        workers = list(scheduler.workers.available())
        used, most = await self._bus.memory()
        self._warn_of_memory(used, most)
        scheduler.takes_batch = most == 0 or used < MEMORY_FOR_BATCH * most
        status = m.SchedulerStatus(
            queued=scheduler.backlog.num_queued,
            running=scheduler.workers.num_assigned,
            workers=len(workers),
            drain_rate=self._drain.rate,
            queued_tokens=scheduler.backlog.num_tokens,
            queued_batch=scheduler.backlog.by_class[BATCH],
            used_bytes=used,
            max_bytes=most,
            oldest_ms=scheduler.oldest_ms(),
            dead_letters=await self._bus.dead_letters.count(),
            leader=self._lease.token,
            running_adapters=_most(sum((worker.by_digest for worker in workers), Counter[str]())),
            waiting_adapters=_most(scheduler.backlog.by_digest),
            sent_ms=now_ms(),
            drain_next=self._drain_next,
            bases=scheduler.bases(),
            becoming={name: order.base for name, order in scheduler.swaps.by_worker.items()},
            knows=sorted({name for worker in workers for name in worker.knows}),
            version=RELEASE,
            tenants=_tenants(scheduler.backlog.by_tenant),
        )
        await self._bus.set(self._bus.keys.status, status, STATUS_TTL_MS)

    def _warn_of_memory(self, used: int, most: int) -> None:
        """Log once when the queue's memory becomes short, and once when it no longer is."""
        is_short = most > 0 and used >= MEMORY_ALARM * most
        if is_short and not self._memory_is_short:
            logger.warning("the queue holds %d of %d bytes; calls are refused above 90 %%", used, most)
        elif self._memory_is_short and not is_short:
            logger.info("the queue holds %d of %d bytes", used, most)
        self._memory_is_short = is_short


def _count(batch: list[QueuedRequest]) -> None:
    """Count an assignment in the metrics."""
    num_ready = sum(request.ready for request in batch)
    metrics.ASSIGNED.labels(metrics.ADAPTER_THERE).inc(num_ready)
    metrics.ASSIGNED.labels(metrics.ADAPTER_COMING).inc(len(batch) - num_ready)
    now = now_ms()
    for request in batch:
        if request.submit.submitted_ms and not request.resumed:
            metrics.QUEUE_SECONDS.observe(max(0, now - request.submit.submitted_ms) / 1000)


def _audited(order: Swap, outcome: str) -> AuditEntry:
    """Return the audit entry of an order to switch a worker to another base."""
    detail = f"from={order.seat.base} to={order.base} why={order.why}"
    return AuditEntry(now_ms(), SCHEDULER, "", "", "worker.swap", order.seat.name, detail, outcome, True)


def _most(digests: Mapping[str, int]) -> list[str]:
    """Return the adapters with the most requests, at most MAX_TOLD."""
    return nlargest(MAX_TOLD, (digest for digest in digests if digest), key=digests.__getitem__)


def _tenants(queued: Mapping[str, TenantQueued]) -> dict[str, m.TenantLoad]:
    """Return the load of the tenants with the most waiting requests or tokens, at most MAX_TOLD of each."""
    by_num = nlargest(MAX_TOLD, queued, key=lambda tenant: queued[tenant].num)
    by_tokens = nlargest(MAX_TOLD, queued, key=lambda tenant: queued[tenant].num_tokens)
    return {
        tenant: m.TenantLoad(queued[tenant].num, queued[tenant].num_batch, queued[tenant].num_tokens)
        for tenant in dict.fromkeys(by_num + by_tokens)
    }


def _assigned(request: QueuedRequest, now: int) -> m.Assigned:
    sub = request.submit
    queued_ms = max(0, now - sub.submitted_ms) if sub.submitted_ms else 0
    return m.Assigned(
        sub.rid, request.epoch + 1, sub.digest, sub.tenant, sub.gateway, request.yields, sub.choice, sub.call, sub.part,
        sub.cls == BATCH, queued_ms, sub.trace, request.alone,
    )  # fmt: skip
