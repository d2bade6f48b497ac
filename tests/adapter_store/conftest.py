"""A running store on a real queue."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from helpers.store_run import RunStore, StoreRun

from adapter_store.service import serve
from adapter_store.timings import StoreTimings
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings


@pytest.fixture
def settings(tmp_path: Path, bus: Bus) -> Settings:
    root = tmp_path / "adapters"
    root.mkdir()
    return Settings(redis_url=bus.url, adapters=root, data=tmp_path / "data", scan_interval_s=0.05)


@pytest.fixture
def timings() -> StoreTimings:
    """The timings of the stores that `run_store` starts; a test may change them."""
    return StoreTimings()


@pytest_asyncio.fixture
async def run_store(bus: Bus, settings: Settings, timings: StoreTimings) -> AsyncIterator[RunStore]:
    """Return a function that starts a store with changed settings; all are stopped after the test."""
    runs: list[StoreRun] = []

    def start(**changes: Any) -> StoreRun:
        stop = asyncio.Event()
        mine = Settings(**{**settings.model_dump(), **changes})
        run = StoreRun(asyncio.ensure_future(serve(mine, stop, timings)), stop, bus)
        runs.append(run)
        return run

    yield start
    for run in runs:
        if not run.task.done():
            await run.end()
