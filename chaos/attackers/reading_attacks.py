"""Attacks without generation: repeated lists, one job read by hundreds of clients, waiting orders, wrong URLs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from chaos.attackers.attacker import Attack, Attacker, together
from chaos.attackers.attacks import COMPLETIONS, completion

LISTS = (
    "/v1/adapters?limit=1000", "/v1/models", "/api/tags", "/api/ps", "/info", "/v1/requests?limit=100",
    "/v1/jobs?limit=100", "/v1/files", "/v1/batches", "/v1/usage", "/v1/jobs?status=expired&limit=100",
    "/v1/requests?state=ended&limit=1", "/v1/adapters?tenant=attacker&limit=1", "/v1/files?purpose=vision",
    "/v1/timeseries?range=24h&group_by=model", "/v1/requests/nobody",
)  # fmt: skip
READERS, ROUNDS = 24, 5


async def _lists(attacker: Attacker) -> None:
    async def reader(number: int) -> None:
        for turn in range(ROUNDS):
            await attacker.get(LISTS[(number + turn) % len(LISTS)])

    await together(*(reader(number) for number in range(READERS)))


async def _readers(attacker: Attacker) -> None:
    """Stream a running job from hundreds of connections, then one that has ended."""
    body = completion(background=True, max_tokens=100, ignore_eos=True, echo=True, prompt="data: x\n\nid: 1\n\u2028")
    job = await attacker.post(COMPLETIONS, body)
    path = f"/v1/jobs/{(job or {}).get('id', 'job_none')}"

    async def read(_: int) -> None:
        await attacker.get(f"{path}/stream", last_event_id="7")

    await together(*(read(number) for number in range(200)))
    await together(*(attacker.get(path, prefer="wait=5") for _ in range(100)))


async def _slow_readers(attacker: Attacker) -> None:
    """Stream a job and stop reading, so that the data kept for readers has expired when reading resumes."""
    body = completion(background=True, max_tokens=200, ignore_eos=True, logprobs=5)
    job = await attacker.post(COMPLETIONS, body)

    async def stall(pieces: AsyncIterator[bytes]) -> None:
        await anext(pieces, b"")
        await asyncio.sleep(1)
        async for _ in pieces:
            pass

    path = f"/v1/jobs/{(job or {}).get('id', 'job_none')}/stream"
    await together(*(attacker.stream(path, None, stall) for _ in range(50)))


async def _orders(attacker: Attacker) -> None:
    """Send requests that neither generate nor list: near misses of route URLs, and orders that wait for workers."""

    async def ask(number: int) -> None:
        for turn in range(ROUNDS):
            await attacker.post(f"/v1/chat/completion{number}{turn}", {})
            await attacker.get(f"/v1/adapter/{number}{turn}")
            await attacker.post("/v1/adapters/one/preload?wait_s=1", {})
            await attacker.post("/api/show", {"model": "one"})

    await together(*(ask(number) for number in range(100)))


READING_ATTACKS = (
    Attack("orders and URLs of no route from 100 clients", _orders, frozenset({"200", "202"})),
    Attack("24 readers of lists", _lists, frozenset({"200"})),
    Attack("200 readers of one job", _readers, frozenset({"200", "202"})),
    Attack("50 slow readers of one job", _slow_readers, frozenset({"200", "202"})),
)
