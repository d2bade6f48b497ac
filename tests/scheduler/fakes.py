"""A worker simulated by a test, and requests to schedule."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
from helpers.waiting import wait_until

from protocol.queue.books.quota import Quota
from protocol.queue.bus import Bus, StepResult, StepRow, decode, now_ms
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from scheduler.core import Scheduler
from scheduler.service import serve
from scheduler.swaps import Swap

GATEWAY = "g-test"


def make_submit(
    rid: str, *, digest: str = "", tenant: str = "t", cls: str = "interactive", **more: object
) -> m.RequestHead:
    facts: dict[str, object] = {"num_prompt_tokens": 4, "max_new_tokens": 4, "deadline_ms": now_ms() + 3_600_000}
    facts |= {"gateway": GATEWAY, "submitted_ms": now_ms()} | more
    return m.RequestHead(rid=rid, tenant=tenant, cls=cls, digest=digest, **facts)  # type: ignore[arg-type]


def order_swaps(scheduler: Scheduler, now_ms: float) -> list[Swap]:
    """Return the swap orders at `now_ms`, as the session would give them."""
    asked = scheduler.swaps.asked(scheduler.ledger.mean_output_tokens)
    if asked is None:
        return []
    asked.add(scheduler.requests.values())
    return scheduler.swaps.decide(now_ms, asked)


async def submit(bus: Bus, *subs: m.RequestHead, max_queued: int = 1000, quota: Quota | None = None) -> str:
    prompt = np.arange(4, dtype="<i4").tobytes()
    pairs = [(s, m.Body(prompt=prompt, sampling=m.Sampling(), max_new_tokens=s.max_new_tokens)) for s in subs]
    status, _ = await bus.submit(subs[0].cls, pairs, max_queued=max_queued, quota=quota)
    return status


@dataclass(slots=True)
class FakeWorker:
    """Sends heartbeats, reads its work stream and writes what the test specifies."""

    bus: Bus
    wid: str
    name: str = ""
    capacity: int = 8
    resident: list[str] = field(default_factory=list)
    held: dict[str, m.Assigned] = field(default_factory=dict)
    batches: list[list[m.Assigned]] = field(default_factory=list)
    orders: list[m.Control] = field(default_factory=list)
    draining: bool = False
    knows: list[str] = field(default_factory=list)
    base: str = ""
    may_become: list[str] = field(default_factory=list)
    _entries: dict[bytes, set[str]] = field(default_factory=dict)
    _last: dict[str, bytes] = field(default_factory=dict)
    _sent: int = 0

    async def join(self) -> FakeWorker:
        keys = self.bus.keys
        for stream in (keys.work(self.wid), keys.ctl(self.wid)):
            await self.bus.streams.create(stream, 3600)
            self._last[stream] = b"0"
        await self.beat()
        return self

    async def beat(self) -> None:
        self._sent += 1
        lengths = [await self.bus._redis.strlen(self.bus.keys.tok(rid)) for rid in self.held]
        beat = m.WorkerBeat(
            wid=self.wid, name=self.name or self.wid, capacity=self.capacity, running=len(self.held),
            progress=[(rid, length // 4) for rid, length in zip(self.held, lengths, strict=True)],
            resident=self.resident, draining=self.draining, knows=self.knows, sent_ms=now_ms() * 1000 + self._sent,
            base=self.base, may_become=self.may_become,
        )  # fmt: skip
        keys = self.bus.keys
        streams = (keys.work(self.wid), keys.ctl(self.wid))
        await self.bus.members.beat(keys.worker_beat(self.wid), keys.workers, self.wid, m.encode(beat), 4000, streams)

    async def read(self) -> None:
        """Read new assignments and orders."""
        keys = self.bus.keys
        work, ctl = keys.work(self.wid), keys.ctl(self.wid)
        for entry, fields in await self._new(work):
            items = decode(fields[b"b"], list[m.Assigned])
            self.batches.append(items)
            self._entries[entry] = {item.rid for item in items}
            self.held |= {item.rid: item for item in items}
        self.orders += [decode(fields[b"b"], m.Control) for _, fields in await self._new(ctl)]

    async def _new(self, stream: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        last = self._last[stream]
        entries = await self.bus._redis.xrange(stream, min="-" if last == b"0" else b"(" + last)
        if entries:
            self._last[stream] = entries[-1][0]
        return entries

    async def write(self, rid: str, num_tokens: int = 1, *, end: bool = False) -> list[str]:
        """Write tokens of one request, and its end if `end`. Return the codes of refused rows."""
        item = self.held[rid]
        seq0 = await self.bus._redis.strlen(self.bus.keys.tok(rid)) // 4
        ids = np.arange(seq0, seq0 + num_tokens, dtype="<i4").tobytes()
        row = StepRow(rid, item.epoch, seq0, ids, state="completed" if end else "", finish="length" if end else "")
        step = StepResult(rows=[row])
        if item.gateway:
            step.outs = {item.gateway: [m.Delta(rid, item.epoch, seq0, ids, finish=row.finish)]}
        if end:
            step.ended = [m.Ended(rid, self.wid, item.epoch, seq0 + num_tokens)]
            step.done_entries = [e for e, rids in self._entries.items() if rids == {rid}]
        refused = await self.bus.step(self.wid, step)
        if not refused and end:
            self.drop(rid)
        return [row.code for row in refused]

    def drop(self, rid: str) -> None:
        self.held.pop(rid, None)
        for rids in self._entries.values():
            rids.discard(rid)

    async def run(self, stop: Callable[[], bool]) -> None:
        """Complete all incoming requests and send heartbeats, until `stop` returns true."""
        while not stop():
            await self.read()
            for rid in list(self.held):
                await self.write(rid, self.held[rid].epoch and 4, end=True)
            await self.beat()
            await asyncio.sleep(0.005)


async def start_scheduler(bus: Bus, **settings: object) -> asyncio.Task[int]:
    """Start a scheduler that the test ends by cancelling it, which leaves its lease behind."""
    stop = asyncio.Event()
    return asyncio.create_task(serve(Settings(redis_url=bus.url, **settings), stop))  # type: ignore[arg-type]


@asynccontextmanager
async def running_scheduler(bus: Bus, **settings: object) -> AsyncIterator[asyncio.Event]:
    """Run a scheduler on the queue during the block; yield the event that stops it."""
    stop = asyncio.Event()
    task = asyncio.create_task(serve(Settings(redis_url=bus.url, **settings), stop))  # type: ignore[arg-type]
    try:
        yield stop
    finally:
        stop.set()
        assert await task == 0


async def holds(worker: FakeWorker, *rids: str) -> None:
    """Wait until a worker has these requests, sending its heartbeats."""

    async def has() -> bool:
        await worker.read()
        await worker.beat()
        return set(rids) <= worker.held.keys()

    await wait_until(has, f"{worker.wid} holds {rids}")


async def state(bus: Bus, rid: str) -> str:
    return (await bus._redis.hget(bus.keys.req(rid), "state")).decode()


async def becomes(bus: Bus, rid: str, value: str, *living: FakeWorker) -> None:
    async def has() -> bool:
        for worker in living:
            await worker.beat()
        return await state(bus, rid) == value

    await wait_until(has, f"{rid} becomes {value}")


async def deltas(bus: Bus) -> list[m.Delta]:
    entries = await bus.streams.entries(bus.keys.out(GATEWAY))
    return [delta for _, fields in entries for delta in decode(fields[b"b"], list[m.Delta])]


async def status_is(bus: Bus, **expected: int) -> bool:
    status = await bus.get(bus.keys.status, m.SchedulerStatus)
    return status is not None and all(getattr(status, name) == value for name, value in expected.items())


async def gateways_are(bus: Bus, *gids: str) -> bool:
    return await bus.members.ids(bus.keys.gateways) == list(gids)
