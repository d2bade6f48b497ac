"""A hostile tenant does no harm: during every attack an honest tenant is answered as if it were alone.

Asserted are counts and generous ratios, never times; `hostile.arena` defines them. `make hostile` attacks for longer
and writes a table.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from helpers.preloaded import fork
from helpers.waiting import wait_until
from hostile.arena import NAMES, Arena, arena_in

from chaos.attackers.attacker import Attacker
from chaos.attackers.attacks import COMPLETIONS, completion
from chaos.attackers.webhook_attacks import ENDPOINTS, WEBHOOK_ATTACKS

SECONDS = float(os.environ.get("LORAFLEET_HOSTILE_S", "0.1"))
"""Seconds for which rounds of an attack are started; each attack has at least one round."""

ALONE_S = 1.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arena(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Arena]:
    async with arena_in(tmp_path_factory.mktemp("arena"), spawn=fork) as arena:
        await arena.rest(ALONE_S)
        yield arena


@pytest.mark.parametrize("name", NAMES)
async def test_the_victim_notices_nothing_of(arena: Arena, name: str) -> None:
    attack, key = next(pair for pair in arena.attacks() if pair[0].name == name)
    trial = await arena.attack(attack, SECONDS, key)
    assert trial.told, "nothing was sent"
    assert trial.wrong == []


WEBHOOK_S = 4.0
"""Minimum seconds used for a job with its webhook; a receiver that does not answer holds its slot for 15 s."""


async def test_webhooks_arrive_beside_those_that_nobody_takes(arena: Arena) -> None:
    """Three tenants with endpoints that hang at the receiver or in DNS at most double the wait of a fourth one."""
    arrived: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        writer.close()

    victim = Attacker(arena.fleet.url, arena.keys["victim"])
    attackers = [Attacker(arena.fleet.url, arena.keys[name]) for name in ("attacker", "thief", "owner")]
    server = await asyncio.start_server(serve, "127.0.0.1", 0)

    async def wait_s() -> float:
        began, before = time.monotonic(), len(arrived)
        assert await victim.post(COMPLETIONS, completion(background=True)) is not None
        await wait_until(lambda: len(arrived) > before, "the webhook has arrived")
        return time.monotonic() - began

    try:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
        made = await victim.post(ENDPOINTS, {"name": "n", "url": url, "event_types": ["job.completed"]})
        assert "id" in made, made
        alone_s = max([await wait_s() for _ in range(3)])
        await asyncio.gather(*(WEBHOOK_ATTACKS[0].once(attacker) for attacker in attackers))
        for attacker in attackers:
            assert attacker.told["429"] > 0, attacker.told  # tests beyond the free slots
            assert WEBHOOK_ATTACKS[0].wrongly_told(attacker.told) == []
        assert max([await wait_s() for _ in range(3)]) <= 2 * max(alone_s, WEBHOOK_S)
    finally:
        server.close()
        for client in (victim, *attackers):
            await client.close()
