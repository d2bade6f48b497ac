"""A worker on a real queue with an engine that has no model, and queries about both for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from helpers.waiting import wait_until

from benchmarks.common.fake_worker import FakeEngine, expected_token, fake_served
from gpu_worker.service.service import WorkerService
from protocol.queue.bus import Bus, decode, now_ms
from protocol.runtime.settings import Settings
from protocol.wire import messages as m

GATEWAY = "g-test"
VOCAB = 1000
PROMPT = np.arange(1, 6, dtype="<i4")
SERVED = fake_served(vocab_size=VOCAB)


@asynccontextmanager
async def running_worker(
    bus: Bus,
    *,
    engine: FakeEngine | None = None,
    step_s: float = 0.002,
    served: m.ServedModel = SERVED,
    **settings: Any,
) -> AsyncIterator[tuple[WorkerService, asyncio.Event]]:
    """Run a worker on the queue; leaving the block drains it."""
    engine = engine or FakeEngine(step_s=step_s, vocab_size=VOCAB)
    own = Bus(bus.url)
    worker = WorkerService(own, engine, served, Settings(worker_name="w", **settings))
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    try:
        await wait_until(lambda: beats(bus, worker), "the worker beats")
        yield worker, stop
    finally:
        stop.set()
        await task
        engine.stop()
        await own.close()


async def submit(bus: Bus, rid: str, *, max_new: int = 8, cls: str = "interactive") -> None:
    sub = m.RequestHead(
        rid=rid, tenant="t", cls=cls, digest="", num_prompt_tokens=len(PROMPT), max_new_tokens=max_new,
        deadline_ms=now_ms() + 3_600_000, gateway=GATEWAY,
    )  # fmt: skip
    body = m.Body(prompt=PROMPT.tobytes(), sampling=m.Sampling(), max_new_tokens=max_new)
    status, _ = await bus.submit(cls, [(sub, body)], max_queued=100)
    assert status == "ok"


async def assign(bus: Bus, wid: str, *rids: str, yields: bool = False) -> str:
    batch = []
    for rid in rids:
        epoch = int(await bus._redis.hget(bus.keys.req(rid), "epoch"))
        batch.append((m.Assigned(rid, epoch + 1, "", "t", GATEWAY, yields=yields), epoch))
    status, _ = await bus.assign(wid, batch)
    return status


async def state(bus: Bus, rid: str) -> str:
    return (await bus._redis.hget(bus.keys.req(rid), "state")).decode()


async def log(bus: Bus, rid: str) -> list[int]:
    return np.frombuffer(await bus._redis.get(bus.keys.tok(rid)) or b"", "<i4").tolist()


async def deltas(bus: Bus, rid: str) -> list[m.Delta]:
    entries = await bus.streams.entries(bus.keys.out(GATEWAY))
    return [d for entry in entries if entry[1][b"b"] for d in decode(entry[1][b"b"], list[m.Delta]) if d.rid == rid]


def expected(num: int) -> list[int]:
    return [expected_token(PROMPT, position, VOCAB) for position in range(num)]


async def beats(bus: Bus, worker: WorkerService) -> bool:
    return bool(worker.wid) and bool(await bus._redis.exists(bus.keys.worker_beat(worker.wid)))
