"""A store process that is killed at a bad moment, or whose disk is full, recovers and serves nothing incomplete."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.adapter_files import BASE, adapter_bytes, write_adapter
from helpers.hub_stub import LFS_BYTES, HubStub, Repo
from helpers.reported import report
from helpers.store_run import ask, get, in_state
from helpers.waiting import wait_until

from peft_adapters.format import WEIGHTS_FILE
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.settings import Settings
from protocol.wire import messages as m


@contextmanager
def store_process(settings: Settings, *within: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a store in its own process, started by the command `within`; kill it with SIGKILL at the end."""
    command = [*within, sys.executable, "-m", "adapter_store"]
    process = subprocess.Popen(command, env=os.environ | settings.environment(), stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def url_of(bus: Bus, before: set[str]) -> str:
    """Wait for a store that was not among `before`; return its address."""

    async def find() -> str:
        for sid in set(await bus.members.ids(bus.keys.stores)) - before:
            raw = await bus._redis.get(bus.keys.store_beat(sid))
            if raw:
                return raw.decode()
        return ""

    return await wait_until(find, "a store has registered")


async def test_killed_in_mid_download(
    bus: Bus, settings: Settings, hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process resumes the download as soon as the dead process's lease has expired."""
    await report(bus, BASE)
    hub.repos["org/a"] = Repo()
    hub.repos["org/a"].commit(adapter_bytes())
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    await bus.adapters.register(m.Registration(name="a", source="hub:org/a", asked_ms=now_ms()))
    hub.gate = asyncio.Event()
    staging = settings.data / "adapters" / "staging"

    def received() -> bool:
        return any(path.stat().st_size == LFS_BYTES for path in staging.glob(f"*/{WEIGHTS_FILE}"))

    with store_process(settings) as process:
        await wait_until(lambda: hub.requests(WEIGHTS_FILE), "the download has begun")
        assert (await in_state(bus, "a", "downloading")).digest == ""
        # Received bytes stay in memory until there is a megabyte or the connection breaks.
        hub.drop_gated = True
        hub.gate.set()
        await wait_until(received, "the first bytes are on disk")
        hub.drop_gated = False
        hub.down = True
        process.kill()
    before = set(await bus.members.ids(bus.keys.stores))
    await bus._redis.delete(bus.keys.fetching("a"))  # instead of waiting for it to expire
    hub.down = False
    hub.gate = None
    hub.seen.clear()
    with store_process(settings):
        alias = await in_state(bus, "a", "on_disk")
        await ask(await url_of(bus, before), alias.digest)
        assert [seen.range.partition("-")[0] for seen in hub.requests(WEIGHTS_FILE)] == [f"bytes={LFS_BYTES}"]


@pytest.mark.parametrize("num_blobs", [0, 1, 5, 12])
async def test_killed_in_mid_write(bus: Bus, settings: Settings, num_blobs: int) -> None:
    """Killed after some of twenty adapters: every announced adapter can be fetched, and all are served in the end."""
    await report(bus, BASE)
    assert settings.adapters is not None
    for seed in range(20):
        write_adapter(settings.adapters / f"a{seed}", seed=seed)
    blobs = settings.data / "adapters" / "blobs"

    def some_are_in() -> bool:
        return blobs.is_dir() and len(list(blobs.iterdir())) >= num_blobs

    with store_process(settings) as process:
        await wait_until(some_are_in, "some are in", every_s=0.0005)
        process.kill()
    announced = [alias.digest for alias in await bus.adapters.aliases() if alias.state == "on_disk"]
    before = set(await bus.members.ids(bus.keys.stores))
    with store_process(settings):
        url = await url_of(bus, before)
        for digest in announced:
            await ask(url, digest)
        for seed in range(20):
            await ask(url, (await in_state(bus, f"a{seed}", "on_disk")).digest)
        assert (await get(f"{url}/health")).json()["num_blobs"] == 20
    assert not list((settings.data / "adapters" / "trash").iterdir())


async def test_full_disk(bus: Bus, settings: Settings) -> None:
    """The reason is clear, other adapters are still served, and the adapter is fetched once there is space."""
    settings = settings.model_copy(update={"keep_free": 0})
    await report(bus, BASE)
    assert settings.adapters is not None
    write_adapter(settings.adapters / "old")
    settings.data.mkdir()
    small_disk = f"mount -t tmpfs -o size=256k none '{settings.data}'; exec \"$@\""
    with store_process(settings, "unshare", "--map-root-user", "--mount", "sh", "-ec", small_disk, "-") as process:
        old = await in_state(bus, "old", "on_disk")
        url = await url_of(bus, set())
        write_adapter(settings.adapters / "new", seed=2, rank=1000)
        assert "bytes do not fit: the disk has" in (await in_state(bus, "new", "failed")).reason
        await ask(url, old.digest)
        there = ["nsenter", f"--target={process.pid}", "--user", "--preserve-credentials", "--mount", "--"]
        await asyncio.to_thread(
            subprocess.run, [*there, "mount", "-o", "remount,size=4m", str(settings.data)], check=True
        )
        await ask(url, (await in_state(bus, "new", "on_disk")).digest)


async def test_ends_when_told(bus: Bus, settings: Settings, tmp_path: Path) -> None:
    """SIGTERM ends it with exit code 0 and removes the store from the members."""
    with store_process(settings) as process:
        await url_of(bus, set())
        process.terminate()
        assert await asyncio.to_thread(process.wait, 30) == 0
    assert await bus.members.ids(bus.keys.stores) == []
