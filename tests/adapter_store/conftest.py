"""A running store on a real queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from waiting import wait_until

from adapter_store.service import serve
from protocol.bus import Bus
from protocol.settings import Settings


@pytest.fixture
def settings(tmp_path: Path, bus: Bus) -> Settings:
    root = tmp_path / "adapters"
    root.mkdir()
    return Settings(redis_url=bus.url, adapters=root, data=tmp_path / "data", scan_interval_s=0.05)


class StoreRun:
    """A store running in this test."""

    def __init__(self, task: asyncio.Task[int], stop: asyncio.Event, bus: Bus) -> None:
        self.task = task
        self.stop = stop
        self.bus = bus

    async def url(self) -> str:
        """Wait for the store's address."""

        async def find() -> str:
            assert not self.task.done(), self.task
            for sid in await self.bus.members(self.bus.keys.stores):
                raw = await self.bus.redis.get(self.bus.keys.store_beat(sid))
                if raw:
                    return raw.decode()
            return ""

        return await wait_until(find, "a store has registered")

    async def end(self) -> None:
        self.stop.set()
        assert await self.task == 0


@pytest_asyncio.fixture
async def run_store(bus: Bus, settings: Settings) -> AsyncIterator[Callable[..., StoreRun]]:
    """Return what starts a store with changed settings; all are stopped after the test."""
    runs: list[StoreRun] = []

    def start(**changes: Any) -> StoreRun:
        stop = asyncio.Event()
        mine = Settings(**{**settings.model_dump(), **changes})
        run = StoreRun(asyncio.ensure_future(serve(mine, stop)), stop, bus)
        runs.append(run)
        return run

    yield start
    for run in runs:
        if not run.task.done():
            await run.end()
