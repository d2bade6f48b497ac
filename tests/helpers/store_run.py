"""A store that runs in the test's own event loop, and functions to query it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx2

from adapter_store.sources.retry import Retries
from helpers.waiting import wait_until
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE, adapter_digest, parse_config, parse_header
from protocol.queue.bus import Bus
from protocol.runtime.fleet_secret import FleetSecret
from protocol.wire import messages as m

QUICK = Retries(first_pause_s=0.001)
"""Retries for tests: as many as in production, with short pauses."""


class StoreRun:
    """A store running in this process."""

    def __init__(self, task: asyncio.Task[int], stop: asyncio.Event, bus: Bus) -> None:
        self.task = task
        self.stop = stop
        self.bus = bus

    async def url(self) -> str:
        """Wait for the store's address and return it."""

        async def find() -> str:
            assert not self.task.done(), self.task
            for sid in await self.bus.members.ids(self.bus.keys.stores):
                raw = await self.bus._redis.get(self.bus.keys.store_beat(sid))
                if raw:
                    return raw.decode()
            return ""

        return await wait_until(find, "a store has registered")

    async def end(self) -> None:
        self.stop.set()
        assert await self.task == 0


RunStore = Callable[..., StoreRun]


async def in_state(bus: Bus, name: str, state: str, *, not_digest: str = "") -> m.Alias:
    """Wait until an alias is in a state, with a digest other than `not_digest`; return it."""

    async def look() -> m.Alias | None:
        alias = await bus.adapters.alias(name)
        return alias if alias and alias.state == state and (not not_digest or alias.digest != not_digest) else None

    return await wait_until(look, f"{name} is {state}")


async def get(url: str, secret: str = "") -> httpx2.Response:
    """Send one GET to a store, authenticated with the fleet's secret if it has one."""
    headers = {"Authorization": f"Bearer {FleetSecret(secret).bearer}"} if secret else {}
    async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
        return await http.get(url)


async def ask(url: str, digest: str, secret: str = "") -> tuple[dict[str, Any], bytes]:
    """Fetch an adapter as a worker does, and check its digest; return its config and weights."""
    answers = [await get(f"{url}/adapters/{digest}/{name}", secret) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    assert [answer.status_code for answer in answers] == [200, 200], answers
    config, weights = parse_config(answers[0].content), answers[1].content
    assert adapter_digest(config, parse_header(weights, len(weights)), weights) == digest
    return config, weights
