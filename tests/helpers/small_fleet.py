"""A gateway, a scheduler and fake workers in the test's process: only the model is not real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.common.fake_worker import FakeEngine, fake_served, serve_fake
from helpers.scripted_fleet import running_gateway
from helpers.waiting import wait_until
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from scheduler.service import serve


@dataclass(slots=True)
class SmallFleet:
    """A gateway, a scheduler and fake workers, in this process."""

    http: httpx2.AsyncClient
    settings: Settings
    workers: dict[str, tuple[FakeEngine, asyncio.Task[int]]]

    def start(self, name: str) -> FakeEngine:
        engine = FakeEngine(step_s=0.002, vocab_size=300)
        own = self.settings.model_copy(update={"worker_name": name})
        task = asyncio.create_task(serve_fake(own, engine, fake_served(vocab_size=300), asyncio.Event()))
        self.workers[name] = engine, task
        return engine

    async def kill(self, name: str) -> None:
        """End a worker without notifying the queue."""
        engine, task = self.workers.pop(name)
        engine.stop()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def small_fleet(bus: Bus, model: Path, *workers: str, **settings: Any) -> AsyncIterator[SmallFleet]:
    own, stop = Settings(redis_url=bus.url), asyncio.Event()
    scheduling = asyncio.create_task(serve(own, stop))
    fleet = SmallFleet(httpx2.AsyncClient(timeout=30), own, {})
    for name in workers:
        fleet.start(name)
    try:
        async with running_gateway(bus, model, **settings) as gateway:
            fleet.http.base_url = gateway.url

            async def ready() -> bool:
                return (await fleet.http.get("/health")).status_code == 200

            await wait_until(ready, "a worker has joined")
            yield fleet
    finally:
        for name in list(fleet.workers):
            await fleet.kill(name)
        stop.set()
        await scheduling
        await fleet.http.aclose()
