"""Attacks by webhooks: receivers that never answer, and host names that no DNS server resolves."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import socket
from functools import cache

from chaos.attackers.attacker import Attack, Attacker
from chaos.attackers.attacks import ANSWERED, COMPLETIONS, completion

ENDPOINTS, JOBS = "/v1/webhook_endpoints", "/v1/jobs"
NUM_ENDPOINTS, NUM_JOBS, NUM_TESTS = 24, 40, 100
TESTING_S = 2.0
"""Maximum seconds to wait for tests: an accepted test lasts until its own timeout."""

EVENTS = ["job.completed", "job.cancelled", "job.failed"]

_numbers = itertools.count()


@cache
def black_hole() -> str:
    """Return a URL on this machine that accepts connections and never answers."""
    return f"http://127.0.0.1:{_kept(socket.create_server(('127.0.0.1', 0), backlog=1))}/hook"


@cache
def silent_dns() -> str:
    """Return ADDRESS:PORT of a DNS server on this machine that never answers."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{_kept(server)}"


def _kept(server: socket.socket) -> int:
    """Keep a socket open until this process ends; return its port."""
    atexit.register(server.close)
    return server.getsockname()[1]


async def _webhooks(attacker: Attacker) -> None:
    """Register the maximum number of endpoints, half of them by host name; send them many events, and test them."""
    urls = [black_hole() if number % 2 else f"http://h{number}.silent.example/" for number in range(NUM_ENDPOINTS)]
    made = await asyncio.gather(
        *(attacker.post(ENDPOINTS, {"name": "n", "url": url, "event_types": EVENTS}) for url in urls)
    )  # fmt: skip
    jobs = await asyncio.gather(
        *(attacker.post(COMPLETIONS, completion(background=True, seed=next(_numbers))) for _ in range(NUM_JOBS))
    )
    await asyncio.gather(*(attacker.post(f"{JOBS}/{job['id']}/cancel", {}) for job in jobs if job and "id" in job))
    ids = [one["id"] for one in made if one and "id" in one] or [
        one["id"] for one in ((await attacker.get(f"{ENDPOINTS}?limit=100")) or {}).get("data", ())
    ]  # fmt: skip
    paths = itertools.islice(itertools.cycle(f"{ENDPOINTS}/{id_}/test" for id_ in ids), NUM_TESTS)
    tests = [asyncio.create_task(attacker.post(path, {"event_type": "job.failed"})) for path in paths]
    if tests:
        await asyncio.wait(tests, timeout=TESTING_S)
    for test in tests:
        test.cancel()
    await asyncio.gather(*tests, return_exceptions=True)


WEBHOOK_ATTACKS = (Attack("webhooks that no endpoint accepts", _webhooks, ANSWERED),)
