"""The asyncio side of a worker: assignments in, one step script per engine step out, beats, drain.

The engine runs in its own thread behind `EnginePort`; this module never waits for a forward pass.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import numpy as np

from gpu_worker.adapters.loader import Loader
from gpu_worker.engine.request import EngineRequest, TokenOutput
from gpu_worker.service.port import EnginePort
from gpu_worker.service.publish import MAX_ROWS, Held, Ledger, Pending, merge, settle
from protocol.queue.bus import CONNECTION_ERRORS, Bus, Entry, decode, now_ms
from protocol.runtime import metrics
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.service import wait_any
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import DeadlineExceeded, Internal, ProtocolError

logger = logging.getLogger(__name__)

BEAT_S = 1.0
BEAT_TTL_MS = 4000
STREAM_TTL_S = 3600


class Fenced(Exception):
    """The fleet took this worker for dead and gave its requests away; it may come back under a new id."""


class Worker:
    """One engine's life on the queue."""

    def __init__(self, bus: Bus, engine: EnginePort, served: m.ServedModel, settings: Settings) -> None:
        self.bus = bus
        self.engine = engine
        self.served = served
        self.settings = settings
        self.name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
        self.wid = ""  # no two memberships of a fleet share one
        self.ledger = Ledger("")
        self.stores: Loader | None = None
        self.draining = False
        self._pending: dict[str, Pending] = {}
        self._steps_unacked = 0
        self._publishing = asyncio.Lock()
        self._publish_s = 0.0  # waited for step scripts, since the start
        self._has_outputs = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._gone = asyncio.Event()  # the engine died
        self._failure: BaseException | None = None

    # ------------------------------------------------------------ called from the engine, through the loop

    def on_outputs(self, outputs: list[TokenOutput]) -> None:
        """Take the outputs of one engine step."""
        merge(self._pending, outputs)
        self._steps_unacked += 1
        self._has_outputs.set()

    def on_death(self, error: BaseException | None) -> None:
        """The engine thread has ended; after a crash every request goes back to the queue."""
        self._failure = error
        self._gone.set()

    # ------------------------------------------------------------ life

    async def run(self, stop: asyncio.Event) -> int:
        """Start the engine, work for the fleet until `stop`, hand over what runs. Returns the exit code."""
        with metrics.serve_metrics(self.settings.metrics_port):
            return await self._work(stop)

    async def _work(self, stop: asyncio.Event) -> int:
        loop = asyncio.get_running_loop()
        self.engine.start(
            lambda outputs: loop.call_soon_threadsafe(self.on_outputs, outputs),
            lambda error: loop.call_soon_threadsafe(self.on_death, error),
        )
        while True:
            try:
                await self._be_member(stop)
                break
            except* Fenced:
                logger.warning("worker %s was taken for dead; joining again", self.wid)
                self.engine.cancel(list(self.ledger.held))
        if self._failure is not None:
            logger.error("the engine died: %r", self._failure)
            return 1
        return 0

    async def _be_member(self, stop: asyncio.Event) -> None:
        """Join under a new id, work until `stop` or the engine's death, leave. Raises Fenced in a group."""
        await self._join()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop) for loop in (self._intake(), self._publish(), self._beats())]
            await self._until_gone(stop)
            await self._drain()
            for task in tasks:
                task.cancel()
        await self._leave()  # when nothing beats any more, which would find the streams gone

    async def _join(self) -> None:
        self.wid = f"w{secrets.token_hex(6)}"
        self.ledger = Ledger(self.wid)
        self._pending = {}
        keys = self.bus.keys
        await self.bus.restarted()  # from now on
        await self.bus.streams.create(keys.work(self.wid), STREAM_TTL_S)
        await self.bus.streams.create(keys.ctl(self.wid), STREAM_TTL_S)
        await self._beat()
        logger.info("worker %s (%s) serves %s", self.wid, self.name, self.served.name)

    async def _until_gone(self, stop: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (stop, self._gone)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _drain(self) -> None:
        """Take no more, and let the last step become durable."""
        self.draining = True
        await self._beat()
        if self._failure is None:
            await asyncio.wrap_future(self.engine.hand_over())
            # The engine's last call_soon_threadsafe was made before the future was set.
            await asyncio.sleep(0)
        await self._publish_once()

    async def _leave(self) -> None:
        """Put everything back on the queue, deregister, end the engine."""
        if await self._requeue_all():
            await self.bus.members.leave(self.wid)
        else:  # registered without a beat: the scheduler finds it dead and ends what is left
            await self.bus.members.silence(self.wid)
        self.engine.stop()

    async def _requeue_all(self) -> bool:
        """Queue again what this worker was given, also what comes in meanwhile, then close its stream.

        Returns False when some of it can only be ended, which is for the scheduler to do.
        """
        stream = self.bus.keys.work(self.wid)
        crashed = self._failure is not None
        while True:
            entries = await self.bus.streams.entries(stream)
            rids = [item.rid for entry in entries for item in _assigned(entry)]
            if rids:
                outcomes = await self.bus.requeue(
                    self.wid, rids, counts=crashed, max_attempts=self.settings.max_attempts, name=self.name
                )
                logger.info("handed back %d requests", sum(o == "requeued" for o in outcomes.values()))
                if any(outcome in ("exhausted", "cancelled") for outcome in outcomes.values()):
                    return False
            if await self.bus.streams.delete(stream, len(entries)):
                return True

    async def _hand_back(self, rids: list[str]) -> None:
        """Queue single requests again."""
        outcomes = await self.bus.requeue(self.wid, rids, counts=False, max_attempts=self.settings.max_attempts)
        for rid, outcome in outcomes.items():
            if outcome == "cancelled":
                await self.bus.finish(rid, "cancelled", "cancelled")

    # ------------------------------------------------------------ in

    async def _intake(self) -> None:
        """Read assignments and orders until cancelled."""
        keys = self.bus.keys
        work, ctl = keys.work(self.wid), keys.ctl(self.wid)
        last_ids: dict[str, bytes] = {work: b"0", ctl: b"0"}
        while True:
            try:
                found = await self.bus.streams.read(last_ids, block_ms=5000)
            except CONNECTION_ERRORS as error:
                logger.warning("queue connection lost while reading: %r", error)
                await wait_any(self._gone, 0.3)
                continue
            for entry in found.get(work, []):
                await self._handle(work, entry, self._take)
            for entry in found.get(ctl, []):
                await self._handle(ctl, entry, self._obey)

    async def _handle(self, stream: str, entry: Entry, do: Callable[[Entry], Awaitable[None]]) -> None:
        """Do what an entry says, until it is done: it is not read a second time."""
        while True:
            try:
                return await do(entry)
            except ProtocolError as error:
                do = partial(self.bus.streams.reject, stream, reason=error.message)
            except CONNECTION_ERRORS as error:
                logger.warning("queue connection lost while taking %s: %r", entry[0].decode(), error)
                await wait_any(self._gone, 0.3)

    async def _take_again(self) -> None:
        """Look through the work stream from its beginning: a restarted queue may hold work that had been done."""
        work = self.bus.keys.work(self.wid)
        for entry in await self.bus.streams.entries(work):
            await self._handle(work, entry, self._take)

    async def _take(self, entry: Entry) -> None:
        """Give one assignment's requests to the engine, unless it has them."""
        items = _assigned(entry)
        if not items:
            return
        inputs = await self.bus.inputs([item.rid for item in items])
        requests: list[EngineRequest] = []
        held: list[Held] = []
        for item, (raw, tok, lp) in zip(items, inputs, strict=True):
            body = decode(raw, m.Body) if raw is not None else None
            held.append(_hold(item, entry[0], body, tok, lp))
            if body is not None:
                requests.append(_engine_request(item, body, tok))
        if self.ledger.knows(entry[0]):
            return
        if again := self.ledger.take(entry[0], held):
            self.engine.cancel(again)
        for rid in {item.rid for item in items} - {request.rid for request in requests}:
            # Its keys have expired; the step script will say so and it is dropped.
            self._pending[rid] = Pending(finish="error", error=DeadlineExceeded("the request has expired"))
            self._has_outputs.set()
        for request in requests:
            self._pending.pop(request.rid, None)
            self.engine.submit(request)

    async def _obey(self, entry: Entry) -> None:
        order = decode(entry[1][b"b"], m.Control)
        if order.kind == "cancel":
            if order.rid in self.ledger.held:
                self.engine.cancel([order.rid])
                self._pending[order.rid] = Pending(finish="cancelled")
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

    # ------------------------------------------------------------ out

    async def _publish(self) -> None:
        """Publish steps until cancelled. What comes while Redis is slow is merged into the next script."""
        while True:
            await self._has_outputs.wait()
            self._has_outputs.clear()
            await self._publish_once()

    async def _publish_once(self) -> None:
        """Make everything pending durable, in scripts of at most MAX_ROWS rows; retry until Redis answers."""
        async with self._publishing:
            whole, self._pending = self._pending, {}
            num_steps, self._steps_unacked = self._steps_unacked, 0
            rids = list(whole)
            try:
                for start in range(0, max(len(rids), 1), MAX_ROWS):
                    await self._write({rid: whole[rid] for rid in rids[start : start + MAX_ROWS]})
            finally:  # also when they are given up with the membership: the engine waits for none of them
                for _ in range(num_steps):
                    self.engine.ack_step()
        if any(new.finish for new in whole.values()):
            self._beat_now.set()

    async def _write(self, pending: dict[str, Pending]) -> None:
        pause_s = 0.02
        while True:
            step = self.ledger.build(pending)
            if not step.rows and not step.done_entries:
                return
            try:
                started = time.perf_counter()
                refused = await self.bus.step(self.wid, step)
                self._publish_s += time.perf_counter() - started
                if not refused:
                    self.ledger.commit(step, pending)
                    return
                verdict = settle(self.ledger, pending, refused)
                for held in verdict.repairs:
                    await self.bus.repair(held.rid, 0, bytes(held.log), bytes(held.logprobs), held.record_bytes)
                if verdict.dropped:
                    self.engine.cancel(verdict.dropped)
                if verdict.returned:
                    await self._hand_back(verdict.returned)
            except CONNECTION_ERRORS as error:
                logger.warning("queue connection lost while publishing: %r", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)

    # ------------------------------------------------------------ beats

    async def _beats(self) -> None:
        look_s, restarted = 0.0, False
        while True:
            try:
                await self._beat()
                if time.monotonic() > look_s:  # a beat may also come with every end
                    look_s = time.monotonic() + BEAT_S
                    restarted = await self.bus.restarted() or restarted
                    if restarted:
                        await self._take_again()
                        restarted = False
            except CONNECTION_ERRORS as error:
                logger.warning("queue connection lost while beating: %r", error)
            await wait_any(self._beat_now, BEAT_S)
            self._beat_now.clear()

    async def _beat(self) -> None:
        stats = self.engine.stats()
        keys = self.bus.keys
        beat = m.WorkerBeat(
            wid=self.wid,
            name=self.name,
            capacity=0 if self.draining else stats.capacity,
            running=stats.running,
            waiting=stats.waiting,
            waiting_adapter=stats.waiting_adapter,
            progress=[(held.rid, held.num_logged) for held in self.ledger.held.values()],
            kv_blocks_free=stats.kv_blocks_free,
            kv_blocks_total=stats.kv_blocks_total,
            pool_bytes_free=stats.pool_bytes_free,
            pool_bytes_total=stats.pool_bytes_total,
            step_model=stats.step_model,
            resident=stats.resident,
            loading=stats.loading,
            host=stats.host,
            pinned=stats.pinned,
            num_loads=stats.num_loads,
            num_fetches=stats.num_fetches,
            counters=msgspec.structs.replace(stats.counters, publish_s=self._publish_s),
            draining=self.draining,
            sent_ms=now_ms(),
        )
        streams = (keys.work(self.wid), keys.ctl(self.wid))
        key = keys.worker_beat(self.wid)
        if not await self.bus.members.beat(key, keys.workers, self.wid, m.encode(beat), BEAT_TTL_MS, streams):
            await self.bus.members.leave(self.wid)
            raise Fenced
        await self._tell_news()
        if self.stores is not None:
            self.stores.set_urls(await self.bus.members.store_urls())
        if self.settings.metrics_port:  # else nobody reads them here
            metrics.WORKERS.show([beat])

    async def _tell_news(self) -> None:
        """Tell the fleet what happened to adapters here. Lost with the connection: nobody depends on it."""
        events, uses = self.engine.take_news()
        if events:
            await self.bus.adapters.announce(*(msgspec.structs.replace(event, source=self.wid) for event in events))
        if uses:
            await self.bus.adapters.note_use(uses)


async def publish_served(bus: Bus, served: m.ServedModel) -> None:
    """Say what the fleet serves. Raises Internal when live workers serve something else."""
    known = await bus.get(bus.keys.base, m.ServedModel)
    others = [beat for beat in (await bus.members.worker_beats()).values() if beat is not None]
    if known is not None and known.fingerprint != served.fingerprint and others:
        raise Internal(f"this fleet serves {known.name} ({known.fingerprint:.12}); {served.name} cannot join it")
    if known is not None and others:
        # The fleet promises what its smallest worker can hold.
        served = msgspec.structs.replace(served, max_model_len=min(served.max_model_len, known.max_model_len))
    await bus.set(bus.keys.base, served)


def _assigned(entry: Entry) -> list[m.Assigned]:
    raw = entry[1].get(b"b", b"")
    return decode(raw, list[m.Assigned]) if raw else []


def _hold(item: m.Assigned, entry: bytes, body: m.Body | None, tok: bytes, lp: bytes) -> Held:
    if body is None:
        return Held(item.rid, item.epoch, entry, item.gateway, item.tenant, 0, 0)
    num = body.sampling.num_logprobs
    record = 0 if num is None else m.logprob_record_bytes(num)
    return Held(
        item.rid, item.epoch, entry, item.gateway, item.tenant, len(body.prompt) // 4, record,
        bytearray(tok), bytearray(lp), body.task,
    )  # fmt: skip


def _engine_request(item: m.Assigned, body: m.Body, tok: bytes) -> EngineRequest:
    return EngineRequest(
        rid=item.rid,
        epoch=item.epoch,
        digest=item.digest,
        prompt=np.frombuffer(body.prompt, "<i4"),
        output=np.frombuffer(tok, "<i4").tolist(),
        sampling=body.sampling,
        max_new_tokens=body.max_new_tokens,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        salt=body.salt,
        lora_scale=body.lora_scale,
        gives_way=item.gives_way,
        over_share=item.over_share,
        grammar=body.grammar,
        task=body.task,
    )


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Load the model and work for the queue until `stop`. Returns the exit code."""
    secret = FleetSecret.of(settings)
    bus = Bus(settings.redis_url)
    stores = Loader(secret.bearer if secret else "")
    try:
        await bus.check()
        engine, served = await asyncio.to_thread(_load, settings, stores)
        if stop.is_set():
            return 0
        await publish_served(bus, served)
        worker = Worker(bus, engine, served, settings)
        worker.stores = stores
        stores.set_urls(await bus.members.store_urls())
        return await worker.run(stop)
    finally:
        stores.close()
        await bus.close()


def _load(settings: Settings, stores: Loader) -> tuple[EnginePort, m.ServedModel]:
    """Build the engine; imports torch, so it runs in a thread and is not part of importing this module."""
    from gpu_worker.load import load_engine

    return load_engine(settings, stores.fetch, stores.describe, stores.fetch_files)
