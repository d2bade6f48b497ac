"""A running store on a real queue, and a small Hub stub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from helpers.hub_stub import HubStub, run_hub
from helpers.store_run import QUICK, RunStore, StoreRun

from adapter_store.blobs import Blobs
from adapter_store.mirror import Mirror
from adapter_store.service import serve
from adapter_store.sources.hub import HubSource
from adapter_store.timings import StoreTimings
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings


@pytest.fixture
def settings(tmp_path: Path, bus: Bus) -> Settings:
    root = tmp_path / "adapters"
    root.mkdir()
    return Settings(redis_url=bus.url, adapters=root, data=tmp_path / "data", scan_interval_s=0.05)


@pytest.fixture
def root(settings: Settings) -> Path:
    assert settings.adapters is not None
    return settings.adapters


@pytest_asyncio.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HubStub]:
    """A Hub without repositories; clients have no token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    async with run_hub() as stub:
        yield stub


@pytest_asyncio.fixture
async def source(hub: HubStub) -> AsyncIterator[HubSource]:
    source = HubSource(hub.url, retries=QUICK)
    yield source
    await source.close()


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(Blobs(tmp_path / "blobs"), max_bytes=1 << 20)


@pytest.fixture
def timings() -> StoreTimings:
    """Return the timings of the stores that `run_store` starts; a test may change them."""
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
