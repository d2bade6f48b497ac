"""Reads have a rate of their own, by tenant or address, of which lists take more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.auth.callers import CALLER, EVERYBODY, Caller
from gateway.http.shapes import shape_of
from gateway.overload.reads import BURST_S, LIST_COST, LISTS_AT_ONCE, MAX_DEBT_S, MAX_READERS, Reads
from protocol.queue.books.api_keys import Tenant

PER_S = 100.0


class Clocked:
    """The limit before an answer of so many bytes, by a clock that a test sets."""

    def __init__(self, per_s: float = PER_S, num_bytes: int = 0) -> None:
        self.s = 0.0
        self.num_bytes = num_bytes
        self.go = asyncio.Event()
        self.go.set()
        self.reads = Reads(self._answer, shape_of, per_s, lambda: self.s)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * self.num_bytes})

    async def ask(
        self, path: str, tenant: str = "a", *, method: str = "GET", address: str = "10.0.0.1"
    ) -> tuple[int, dict[bytes, bytes]]:  # fmt: skip
        """Return the status and the headers of an answer. tenant: "" for a fleet without keys."""
        caller = Caller(Tenant(name=tenant)) if tenant else EVERYBODY
        scope = {"type": "http", "method": method, "path": path, "headers": [], CALLER: caller, "client": (address, 1)}
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError

        await self.reads(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"])

    async def num_let_in(self, path: str, num: int, **who: Any) -> int:
        """Return how many of `num` requests were answered 200."""
        return sum([(await self.ask(path, **who))[0] == 200 for _ in range(num)])


@pytest.mark.parametrize(
    ("path", "cost"), [("/v1/jobs/job_1", 1), ("/v1/adapters", LIST_COST), ("/api/tags/", LIST_COST)]
)
async def test_a_reader_has_what_comes_in_five_seconds_and_then_its_rate(path: str, cost: int) -> None:
    clocked = Clocked()
    burst = int(BURST_S * PER_S / cost)
    assert await clocked.num_let_in(path, burst + 20) == burst
    status, headers = await clocked.ask(path)
    assert (status, headers[b"retry-after"]) == (429, b"1")
    assert await clocked.num_let_in(path, 5, tenant="b") == 5, "another tenant has its own"
    clocked.s += 1.0
    assert await clocked.num_let_in(path, burst) == PER_S / cost
    clocked.s += 3600.0
    assert await clocked.num_let_in(path, burst + 20) == burst


async def test_a_long_list_costs_its_bytes_once_they_are_sent() -> None:
    clocked = Clocked(num_bytes=4096 * 1000)
    assert await clocked.num_let_in("/v1/models", 50) == 1
    assert (await clocked.ask("/v1/models/base"))[0] == 429
    clocked.s += 5.2
    assert (await clocked.ask("/v1/models/base"))[0] == 200
    clocked.num_bytes = 1 << 30
    clocked.s += 3600
    assert await clocked.num_let_in("/v1/models", 50) == 1
    clocked.s += MAX_DEBT_S + 0.2
    assert (await clocked.ask("/v1/models"))[0] == 200, "a debt has an end"


async def test_so_many_lists_are_made_at_once_for_one_reader() -> None:
    clocked = Clocked()
    clocked.go.clear()
    tasks = [asyncio.create_task(clocked.ask("/v1/requests")) for _ in range(LISTS_AT_ONCE)]
    await asyncio.sleep(0)
    assert (await clocked.ask("/v1/requests"))[0] == 429
    tasks[0].cancel()
    other = asyncio.create_task(clocked.ask("/v1/requests", "b"))
    await asyncio.sleep(0)
    tasks[0] = asyncio.create_task(clocked.ask("/v1/requests"))
    await asyncio.sleep(0)
    clocked.go.set()
    assert [(await task)[0] for task in (*tasks, other)] == [200] * (LISTS_AT_ONCE + 1)


async def test_probes_calls_and_this_machine_are_not_counted() -> None:
    clocked = Clocked(per_s=0.1)
    for path, who in (
        ("/health", {}), ("/ping", {}), ("/metrics", {}), ("/v1/adapters", {"method": "POST"}),
        ("/v1/adapters", {"tenant": "", "address": "127.0.0.1"}),
    ):  # fmt: skip
        assert await clocked.num_let_in(path, 50, **who) == 50, path
    assert await clocked.num_let_in("/v1/version", 50, tenant="") == 0
    assert await clocked.num_let_in("/v1/version", 50, tenant="", method="HEAD") == 0
    assert await Clocked(per_s=0).num_let_in("/v1/adapters", 50) == 50, "0 is no limit"


async def test_readers_are_forgotten_before_they_are_too_many() -> None:
    clocked = Clocked()
    for number in range(MAX_READERS + 5):
        await clocked.ask("/v1/version", tenant=f"t{number}")
    assert len(clocked.reads._readers) == MAX_READERS
