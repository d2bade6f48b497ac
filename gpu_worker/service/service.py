"""The asyncio side of a worker: takes assignments, sends one step script per engine step and heartbeats, and drains.

The engine runs in its own thread, behind `EngineThread`; this module never waits for a forward pass.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from functools import partial
from operator import attrgetter

import msgspec

from gpu_worker.adapters.loader.client import Loader
from gpu_worker.engine.engine_thread import EngineThread
from gpu_worker.planning.request import EngineRequest, TokenOutput
from gpu_worker.service.bases import WorkerBases
from gpu_worker.service.conversions import assignments_in, engine_request, owned_request
from gpu_worker.service.outbox import MAX_ROWS, Outbox, OutboxRecovery, add_outputs
from gpu_worker.service.owned import OwnedRequest, PendingOutput
from gpu_worker.service.residency_time import ResidencyTime
from gpu_worker.service.trace import tell_handed_back
from protocol.metrics.fleet import WORKERS
from protocol.metrics.pages import serve_metrics
from protocol.queue.bus import CONNECTION_ERRORS, Bus, Entry, QueueError, decode, now_ms
from protocol.runtime.again import began_ms
from protocol.runtime.guarded import BRISK, FAILED, Loop, guarded, is_queue_away
from protocol.runtime.release import RELEASE
from protocol.runtime.service import wait_any
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import Conflict, DeadlineExceeded, Internal, LorafleetError, ProtocolError
from protocol.wire.messages.requests import KNOWN_FIELDS

logger = logging.getLogger(__name__)

BEAT_S = 1.0
"""Seconds between two heartbeats, and between two checks whether the queue was restarted."""

END_BEAT_S = 0.5
"""Seconds; the end of a request triggers another heartbeat if the last is older. More frequent ones would be useless:
the scheduler learns of ends from the steps."""

BEAT_TTL_MS = 4000
"""TTL of a heartbeat: a worker whose heartbeat has expired counts as dead."""

STREAM_TTL_S = 3600
"""TTL of a worker's streams; each heartbeat renews it."""

MAX_FAILURES = 8
"""Consecutive failures of a loop, not counting an unreachable queue, after which this process ends."""


class Fenced(Exception):
    """The fleet declared this worker dead and reassigned its requests; it may rejoin under a new id."""


class WorkerService:
    """One engine's life on the queue: it joins, takes assignments, publishes outputs, sends heartbeats, and leaves."""

    def __init__(
        self,
        bus: Bus,
        engine: EngineThread,
        served: m.ServedModel,
        settings: Settings,
        loader: Loader | None = None,
        began_ms: int | None = None,
        bases: WorkerBases | None = None,
    ) -> None:
        """loader: the adapter loader, if the engine uses one; it is given the stores' addresses.

        began_ms: unix time of its start; None: that of this program. bases: the bases that its process may serve.
        """
        self.bus = bus
        self.engine = engine
        self.served = served
        self.settings = settings
        self.name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
        self.wid = ""  # unique per membership
        self.outbox = Outbox("")
        self.loader = loader
        self.draining = False
        self.bases = bases or WorkerBases(settings, served.name)
        self.becomes = ""  # the base that it was ordered to serve
        self._ordered = asyncio.Event()  # set by that order
        self._began_ms = began_ms
        self._joined_ms, self._start_s = 0, 0.0
        self._pending: dict[str, PendingOutput] = {}  # by request id
        self._unwritten: dict[str, PendingOutput] = {}  # taken out of `_pending`, but not written yet
        self._last_ids: dict[str, bytes] = {}  # by stream, the last processed entry id
        self._restarted = False  # the queue was restarted, and the work stream must be read from its beginning
        self._look_s = 0.0  # monotonic time of the next check for a restart
        self._num_unacked = 0  # engine steps in `_pending`
        self._publishing = asyncio.Lock()
        self._publish_s = 0.0  # seconds spent waiting for step scripts since the start
        self._has_outputs = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._end_beat_s = 0.0  # monotonic time after which the end of a request triggers a heartbeat
        self._beaten_loads = 0  # the engine's number of loads in the last heartbeat
        self._engine_died = asyncio.Event()
        self._failure: BaseException | None = None  # why the engine died
        self._residency = ResidencyTime(time.monotonic())

    # ------------------------------------------------------------ called from the engine, through the loop

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        """Add the outputs of one engine step to those to be published."""
        add_outputs(self._pending, outputs)
        self._num_unacked += 1
        self._has_outputs.set()

    def on_death(self, error: BaseException) -> None:
        """Record that the engine has crashed; every request goes back to the queue."""
        self._failure = error
        self._engine_died.set()

    # ------------------------------------------------------------ life

    async def run(self, stop: asyncio.Event) -> int:
        """Start the engine, work for the fleet, and hand over what is unfinished. Return the exit code.

        Works until `stop`, or until an order to serve another base, which is then in `becomes`. Raises Conflict if live
        workers serve a different base under its name.
        """
        loop = asyncio.get_running_loop()
        self.engine.start(
            lambda outputs: loop.call_soon_threadsafe(self.on_outputs, outputs),
            lambda error: loop.call_soon_threadsafe(self.on_death, error),
        )
        with serve_metrics(self.settings.metrics_port):
            while True:
                try:
                    await self._be_member(stop)
                    break
                except* Fenced:
                    logger.warning("worker %s was declared dead; rejoining", self.wid)
                    self.engine.cancel(list(self.outbox.owned))
        if self._failure is not None:
            logger.error("the engine died: %r", self._failure)
            return 1
        return 0

    async def _be_member(self, stop: asyncio.Event) -> None:
        """Join under a new id, work until `stop` or the engine's death, leave. Raises Fenced in an exception group."""
        if not await self._joined(stop):
            self.engine.stop()
            return
        self.engine.finish_start()  # the fleet has the heartbeat: first requests arrive meanwhile
        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(guarded(loop)) for loop in self.loops()]
            ends = [group.create_task(event.wait()) for event in (stop, self._engine_died, self._ordered)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            await self._drain()
            for task in (*loops, *ends):
                task.cancel()
        await self._leave()  # after the last heartbeat, which would find the streams gone

    def loops(self) -> list[Loop]:
        """Return the loops that run while it is a member.

        A loop that fails `MAX_FAILURES` times in a row ends the process. The fleet then reassigns its requests and
        counts an attempt for each, so that a request that crashes every worker is given up.
        """
        return [
            Loop("intake", self._intake, 0.0, backoff=BRISK, max_failures=MAX_FAILURES),
            Loop("publishing", self._publish, 0.0, backoff=BRISK, max_failures=MAX_FAILURES),
            Loop("beats", self._beats, BEAT_S, self._beat_now, BRISK, ends=(Fenced,), max_failures=MAX_FAILURES),
            # Separate from the heartbeats, since a file system may hang.
            Loop("added bases", partial(self.bases.look, self.bus), BEAT_S, backoff=BRISK),
        ]

    async def _joined(self, stop: asyncio.Event) -> bool:
        """Join as soon as the queue is reachable and has space; return whether that happened before `stop`.

        The base is already loaded, so waiting is cheaper than a restart.
        """
        num = 0
        while not stop.is_set():
            try:
                await self._join()
                return True
            except CONNECTION_ERRORS as error:
                FAILED.note("joining", error)
                num += 1
                await wait_any(stop, BRISK.pause_s(num))
        return False

    async def _join(self) -> None:
        self.wid = f"w{secrets.token_hex(6)}"
        self.outbox = Outbox(self.wid, self.name)
        self._pending = {}
        self._unwritten = {}
        keys = self.bus.keys
        self._last_ids = {keys.work(self.wid): b"0", keys.ctl(self.wid): b"0"}
        if self.loader is not None:
            self.loader.set_urls(await self.bus.members.store_urls())
        await self.bus.restarted()  # later calls compare with the queue's current state
        await self.bus.streams.create(keys.work(self.wid), STREAM_TTL_S)
        await self.bus.streams.create(keys.ctl(self.wid), STREAM_TTL_S)
        self._joined_ms = now_ms()
        self._start_s = self._start_s or (self._joined_ms - (self._began_ms or began_ms())) / 1000
        try:
            name = await self.bus.members.join(self._own_beat(), self.served, BEAT_TTL_MS, fleet=self.bases.fleet)
        except Conflict:
            await self.bus.members.leave(self.wid)
            self.engine.stop()
            raise
        if name != self.served.name:
            logger.warning("the fleet serves the weights of %s as %s, and so does this worker", self.served.name, name)
            self.served = msgspec.structs.replace(self.served, name=name)
        await self._beat()
        logger.info("worker %s (%s) serves %s", self.wid, self.name, self.served.name)

    async def _drain(self) -> None:
        """Accept no more work, and make the last step durable."""
        self.draining = True
        await self._beat()
        try:
            await self._tell_adapter_events()
        except (*CONNECTION_ERRORS, QueueError) as error:  # a full queue only accepts requests back
            logger.warning("the last use of adapters could not be reported: %s", error)
        if self._failure is None:
            await asyncio.wrap_future(self.engine.hand_over())
            # The engine's last call_soon_threadsafe preceded the future's result.
            await asyncio.sleep(0)
        await self._publish_once()

    async def _leave(self) -> None:
        """Requeue everything, deregister, and end the engine."""
        if await self._requeue_all():
            await self.bus.members.leave(self.wid)
        else:  # registered without a heartbeat: the scheduler declares it dead and ends the rest
            await self.bus.members.silence(self.wid)
        self.engine.stop()

    async def _requeue_all(self) -> bool:
        """Requeue all requests assigned to this worker, including those that arrive meanwhile, then delete its stream.

        Return False if some can only be ended, which is the scheduler's job.
        """
        stream = self.bus.keys.work(self.wid)
        crashed = self._failure is not None
        while True:
            entries = await self.bus.streams.entries(stream)
            rids = [item.rid for entry in entries for item in assignments_in(entry)]
            if rids:
                for rid in rids:
                    if (request := self.outbox.owned.get(rid)) is not None and request.trace:
                        tell_handed_back(request, self.name)
                outcomes = await self.bus.requeue(
                    self.wid, rids, counts=crashed, max_attempts=self.settings.max_attempts, name=self.name
                )
                logger.info("returned %d requests to the queue", sum(o == "requeued" for o in outcomes.values()))
                if any(outcome in ("exhausted", "cancelled") for outcome in outcomes.values()):
                    return False
            if await self.bus.streams.delete(stream, len(entries)):
                return True

    async def _hand_back(self, rids: list[str]) -> None:
        """Requeue single requests."""
        outcomes = await self.bus.requeue(self.wid, rids, counts=False, max_attempts=self.settings.max_attempts)
        for rid, outcome in outcomes.items():
            if outcome == "cancelled":
                await self.bus.finish(rid, "cancelled", "cancelled")

    # ------------------------------------------------------------ in

    async def _intake(self) -> None:
        """Read and process assignments and orders, no faster than the engine accepts them."""
        keys = self.bus.keys
        room = self.engine.room()
        if not room.done():  # awaiting a future takes an event loop iteration and a write to its pipe
            await asyncio.wrap_future(room)
        found = await self.bus.streams.read(dict(self._last_ids), block_ms=5000)
        for stream in (keys.work(self.wid), keys.ctl(self.wid)):
            for entry in found.get(stream, []):
                await self._handle(stream, entry)
                self._last_ids[stream] = entry[0]

    async def _handle(self, stream: str, entry: Entry) -> None:
        """Process an entry; set it aside if it cannot be read, or is an order that cannot be carried out."""
        is_work = stream == self.bus.keys.work(self.wid)
        try:
            await (self._take if is_work else self._obey)(entry)
        except ProtocolError as error:
            await self.bus.streams.reject(stream, entry, error.message)
        except Exception as error:
            if is_work or is_queue_away(error):  # work must not be lost: retry it, here or elsewhere
                raise
            FAILED.note("orders", error)
            await self.bus.streams.reject(stream, entry, repr(error))

    async def _take_again(self) -> None:
        """Read the work stream from its beginning: a restarted queue may hold completed work again."""
        work = self.bus.keys.work(self.wid)
        for entry in await self.bus.streams.entries(work):
            await self._handle(work, entry)

    async def _take(self, entry: Entry) -> None:
        """Give the engine one work entry's requests, unless it has them.

        For an entry taken before, these are the requests whose ends the queue has lost.
        """
        items = assignments_in(entry)
        if was_taken := self.outbox.knows(entry[0]):
            items = await self._lost_ends(items)
        if not items:
            return
        inputs = await self.bus.inputs(items)
        requests: list[EngineRequest] = []
        owned: list[OwnedRequest] = []
        failed: dict[str, LorafleetError] = {}
        for item, found in zip(items, inputs, strict=True):
            if was_taken and item.rid in self.outbox.owned:  # reassigned meanwhile
                continue
            body: m.Body | None = None
            try:
                body = found.body()
                if body is not None:
                    requests.append(engine_request(item, body, found.log))
                else:  # Its keys have expired: the step script will refuse its row, and it is dropped.
                    failed[item.rid] = DeadlineExceeded("the request has expired")
            except Exception as error:  # noqa: BLE001  the request's edge: it must not fail others of its entry
                FAILED.note("requests", error, item.rid)
                why = error.message if isinstance(error, LorafleetError) else type(error).__name__
                body, failed[item.rid] = None, Internal(f"the request could not be read: {why}")
            owned.append(owned_request(item, entry[0], body, found.log, found.logprobs))
        if not was_taken and self.outbox.knows(entry[0]):  # taken by the other loop that reads the stream
            return
        if again := self.outbox.take(entry[0], owned):
            self.engine.cancel(again)
        for rid, reason in failed.items():
            self._pending[rid] = PendingOutput(finish="error", error=reason)
            self._has_outputs.set()
        for request in requests:
            self._pending.pop(request.rid, None)
            self.engine.submit(request)

    async def _lost_ends(self, items: list[m.Assigned]) -> list[m.Assigned]:
        """Return the requests of an entry that ended here but run for a queue that lost its last second of writes."""
        ended = [item for item in items if item.rid not in self.outbox.owned]
        return [
            item
            for item, found in zip(ended, await self.bus.owned([item.rid for item in ended]), strict=True)
            if found is not None and (found.state, found.owner, found.epoch) == ("assigned", self.wid, item.epoch)
        ]

    async def _obey(self, entry: Entry) -> None:
        """Carry out one order."""
        order = decode(entry[1].get(b"b", b""), m.Control)
        if order.kind == "cancel":
            if order.rid in self.outbox.owned:
                self.engine.cancel([order.rid])
                self._pending[order.rid] = PendingOutput(finish="cancelled")
                self._has_outputs.set()
        elif order.kind == "prefetch":
            self.engine.prefetch(order.digest)
        elif order.kind == "pin":
            self.engine.pin(order.digest)
        elif order.kind == "unpin":
            self.engine.unpin(order.digest)
        elif order.kind == "evict":
            self.engine.evict(order.digest, order.order)
        elif order.kind == "queued":
            self.engine.set_queued(order.digests)
        elif order.kind in ("drain", "resume"):
            self.draining = order.kind == "drain"
            self._beat_now.set()
        elif order.kind == "serve" and order.base in self.bases.others and not (self.becomes or self.draining):
            logger.info("worker %s is switching to base %s", self.name, order.base)
            self.becomes = order.base
            self._ordered.set()

    # ------------------------------------------------------------ out

    async def _publish(self) -> None:
        """Publish pending outputs. Those that arrive while Redis is slow go into the next script together."""
        if not self._unwritten:
            await self._has_outputs.wait()
        self._has_outputs.clear()
        await self._publish_once()

    async def _publish_once(self) -> None:
        """Make all pending outputs durable, in scripts of at most MAX_ROWS rows; retry until Redis answers."""
        async with self._publishing:
            if self._unwritten:  # left by a failed iteration
                await self._write(self._unwritten)
                self._unwritten = {}
            whole, self._pending = self._pending, {}
            num_steps, self._num_unacked = self._num_unacked, 0
            has_ends = any(map(attrgetter("finish"), whole.values()))
            self._unwritten = whole
            try:
                if len(whole) <= MAX_ROWS:
                    await self._write(whole)
                else:
                    rids = list(whole)
                    for start in range(0, len(rids), MAX_ROWS):
                        await self._write({rid: whole[rid] for rid in rids[start : start + MAX_ROWS]})
                self._unwritten = {}
            finally:  # even if they are abandoned with the membership: the engine must not wait for them
                for _ in range(num_steps):
                    self.engine.ack_step()
        # The scheduler limits a worker's concurrent loads, and sends more once a heartbeat reports a finished one.
        if self.engine.stats().num_loads != self._beaten_loads or (has_ends and time.monotonic() > self._end_beat_s):
            self._beat_now.set()

    async def _write(self, pending: dict[str, PendingOutput]) -> None:
        """Make `pending` durable; recover from refused rows and retry the rest."""
        pause_s = 0.02
        while True:
            step = self.outbox.build(pending)
            if not step.rows and not step.done_entries:
                return
            try:
                started_s = time.perf_counter()
                refused = await self.bus.step(self.wid, step)
                self._publish_s += time.perf_counter() - started_s
                if not refused:
                    self.outbox.commit(step, pending)
                    return
                await self._recover(self.outbox.recover(pending, refused))
            except CONNECTION_ERRORS as error:
                logger.warning("queue connection lost while publishing: %r", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)

    async def _recover(self, recovery: OutboxRecovery) -> None:
        if recovery.dropped:  # before any await: they may be reassigned meanwhile
            self.engine.cancel(recovery.dropped)
        for request in recovery.repairs:
            await self.bus.repair(request.rid, 0, bytes(request.log), bytes(request.logprobs), request.record_bytes)
        if recovery.returned:
            await self._hand_back(recovery.returned)

    # ------------------------------------------------------------ heartbeats

    async def _beats(self) -> None:
        """Send heartbeats, once a second and on change, and check whether the queue was restarted."""
        await self._beat()
        if time.monotonic() <= self._look_s:  # ends of requests also trigger heartbeats
            return
        self._look_s = time.monotonic() + BEAT_S
        if self.loader is not None:
            self.loader.set_urls(await self.bus.members.store_urls())
        self._restarted = await self.bus.restarted() or self._restarted
        if self._restarted:
            await self._take_again()
            self._restarted = False
        await self._tell_adapter_events()

    def _own_beat(self) -> m.WorkerBeat:
        stats = self.engine.stats()
        self._beaten_loads, self._end_beat_s = stats.num_loads, time.monotonic() + END_BEAT_S
        return msgspec.structs.replace(
            stats, wid=self.wid, name=self.name, base=self.served.name, version=RELEASE, knows=KNOWN_FIELDS,
            capacity=0 if self.draining else stats.capacity, draining=self.draining, sent_ms=now_ms(),
            progress=[(request.rid, request.num_logged) for request in self.outbox.owned.values()],
            counters=msgspec.structs.replace(stats.counters, publish_s=self._publish_s),
            may_become=self.bases.others, becoming=self.becomes, start_s=self._start_s,
            joined_ms=self._joined_ms, started_with=self.settings.workers,
        )  # fmt: skip

    async def _beat(self) -> None:
        """Send the worker's heartbeat. Raises Fenced if its streams are gone."""
        keys, beat = self.bus.keys, self._own_beat()
        streams = (keys.work(self.wid), keys.ctl(self.wid))
        key = keys.worker_beat(self.wid)
        if not await self.bus.members.beat(key, keys.workers, self.wid, m.encode(beat), BEAT_TTL_MS, streams):
            await self.bus.members.leave(self.wid)
            raise Fenced
        if self.settings.metrics_port:  # otherwise there is no reader
            WORKERS.show([beat])

    async def _tell_adapter_events(self) -> None:
        """Report adapter events to the fleet. A lost connection loses them: nothing depends on them.

        Not sent with each heartbeat: while adapters load there are ten per second, and each event wakes every store and
        gateway.
        """
        events, uses = self.engine.take_adapter_events()
        if events:
            await self.bus.adapters.announce(*(msgspec.structs.replace(event, source=self.wid) for event in events))
        if uses:
            await self.bus.adapters.note_use(uses)
        now_s, days = time.monotonic(), self.settings.usage_days
        self._residency.look(self.engine.stats().resident, now_s)
        if days and (times := self._residency.take(now_s, at_once=self.draining)):
            await self.bus.usage.note_residency(times, days)
