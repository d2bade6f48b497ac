"""Requests other than calls are rate limited by tenant or address; lists cost more, and all work is charged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from helpers.asgi import AsgiClient
from starlette.requests import Request

from gateway.adapters.catalogue import CatalogueCopy
from gateway.app.access_table import unserved
from gateway.app.shapes import shape_of
from gateway.auth.callers import CALLER, EVERYBODY, Caller
from gateway.books.usage_routes import UsageEndpoints
from gateway.files.files import FileService
from gateway.http.access import MATCH, RouteTable, normal_path
from gateway.http.paths import COMPLETIONS
from gateway.jobs.jobs import Jobs
from gateway.overload.reads import (
    BURST_S,
    FILES_PER_READ,
    LIST_COST,
    LISTS_AT_ONCE,
    MAX_DEBT_S,
    MAX_READERS,
    NAMES_PER_READ,
    REQUESTS_PER_READ,
    ROWS_PER_READ,
    Reads,
    owe,
    spend,
)  # fmt: skip
from gateway.requests.listing import Filters, RequestList
from protocol.queue.books.api_keys import Tenant
from protocol.queue.bus import Bus
from protocol.queue.history import History
from protocol.wire import messages as m
from protocol.wire.errors import Overloaded
from protocol.wire.keys import private_name

PER_S = 100.0
DAY = 20_000

TABLE = RouteTable(unserved().routes)


class Clocked:
    """The rate limit in front of an answer of `num_bytes`, with a clock set by tests."""

    def __init__(self, per_s: float = PER_S, num_bytes: int = 0) -> None:
        self.s = 0.0
        self.num_bytes = num_bytes
        self.go = asyncio.Event()
        self.go.set()
        self.kind = b"application/json"
        self.does: Callable[[], Awaitable[object]] | None = None
        self.reads = Reads(self._answer, shape_of, per_s, lambda: self.s)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await self.go.wait()
        if self.does is not None:
            await self.does()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", self.kind)]})
        await send({"type": "http.response.body", "body": b"x" * self.num_bytes})

    async def ask(
        self, path: str, tenant: str = "a", *, method: str = "GET", address: str = "10.0.0.1"
    ) -> tuple[int, dict[bytes, bytes]]:  # fmt: skip
        """Return status and headers of an answer. tenant: "" for a fleet without keys."""
        caller = Caller(Tenant(name=tenant)) if tenant else EVERYBODY
        match = TABLE.match(method, normal_path(path, ""))
        scope = {
            "type": "http", "method": method, "path": match.path, "headers": [], CALLER: caller, MATCH: match,
            "client": (address, 1),
        }  # fmt: skip
        client = AsgiClient()
        await self.reads(scope, client.receive, client.send)
        return client.sent[0]["status"], dict(client.sent[0]["headers"])

    async def num_let_in(self, path: str, num: int, **who: Any) -> int:
        """Return how many of `num` requests were answered with 200."""
        return sum([(await self.ask(path, **who))[0] == 200 for _ in range(num)])


@pytest.mark.parametrize(
    ("path", "cost"),
    [("/v1/jobs/job_1", 1), ("/v1/adapters", LIST_COST), ("/metrics", LIST_COST), ("/api/tags/", LIST_COST)],
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
        ("/health", {}), ("/ping", {}), ("/v1/chat/completions", {"method": "POST"}),
        ("/tokenize", {"method": "POST"}),
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


@pytest.mark.parametrize(
    ("method", "path", "cost"),
    [
        ("POST", "/v1/adapters/one/preload", 1), ("DELETE", "/v1/jobs/job_1", 1), ("POST", "/v1/jobs/job_1/cancel", 1),
        ("POST", "/api/show", 1), ("POST", "/v1/files", 1), ("POST", "/v1/adapters", 1), ("PUT", "/v1/jobs", 1),
        ("GET", "/v1/chat/completion", LIST_COST), ("POST", "/v1/chat/completion", LIST_COST),
    ],
)  # fmt: skip
async def test_all_that_is_no_call_has_the_rate(method: str, path: str, cost: int) -> None:
    clocked = Clocked()
    burst = int(BURST_S * PER_S / cost)
    assert await clocked.num_let_in(path, burst + 20, method=method) == burst
    assert await clocked.num_let_in("/v1/jobs/job_1", 5) == 0, "it is one rate"


async def test_long_json_costs_its_bytes_and_streams_and_files_do_not() -> None:
    clocked = Clocked(num_bytes=4096 * 101)
    assert await clocked.num_let_in("/v1/jobs/job_1", 50) == 5
    for kind in (b"text/event-stream", b"application/octet-stream"):
        clocked = Clocked(num_bytes=4096 * 101)
        clocked.kind = kind
        assert await clocked.num_let_in("/v1/jobs/job_1/stream", 50) == 50


async def test_what_an_answer_takes_is_paid_before_it_is_made() -> None:
    clocked, made, refused = Clocked(), 0, 0

    async def work() -> None:
        nonlocal made, refused
        try:
            spend(200.0)
        except Overloaded:
            refused += 1
        else:
            made += 1

    clocked.does = work
    clocked.go.clear()
    asked = [asyncio.create_task(clocked.ask("/v1/jobs/job_1")) for _ in range(50)]
    await asyncio.sleep(0)
    clocked.go.set()
    await asyncio.gather(*asked)
    assert (made, refused) == (3, 47), "all came while there was something left"
    spend(200.0)
    owe(200.0)  # no effect outside a request


async def cost_of(tenant: str, what: Callable[[], Awaitable[object]]) -> float:
    """Return the cost of a list for a tenant, in reads, without the basic cost of a list."""
    clocked = Clocked(per_s=10_000)
    clocked.does = what
    assert (await clocked.ask("/v1/requests", tenant))[0] == 200
    return BURST_S * 10_000 - clocked.reads._readers[f"tenant {tenant}"].left - LIST_COST


class CountedHistory(History):
    """A history that counts the entries it reads."""

    num_read = 0

    async def _fill(self, readers: Sequence[Any], low: str) -> None:
        await super()._fill(readers, low)
        self.num_read += sum(len(one.entries) for one in readers)


async def test_misses_together_look_at_no_more_than_their_reader_has(bus: Bus) -> None:
    """A search for an unknown id reads the whole history; many at once end with 429."""
    caller, num = Caller(Tenant(name="a"), ("infer",)), 1000
    pipe = bus._redis.pipeline(transaction=False)
    for i in range(num):
        end = m.HistoryEntry(f"{i}-0", f"{i}-0", "", "interactive", "completed", "stop", "", "w", 1, 0, 1, 0, 1, 1, 2)
        pipe.xadd(bus.keys.history("a"), {"b": m.encode(end)})
    pipe.expire(bus.keys.history("a"), 60)
    await pipe.execute()
    history = CountedHistory(bus._redis, bus.keys)
    seen: Any = SimpleNamespace(history=history)
    listed, clocked, missed, refused = RequestList(seen), Clocked(), 0, 0

    async def miss() -> None:
        nonlocal missed, refused
        try:
            assert await listed.find(caller, {"nobody"}) is None
        except Overloaded:
            refused += 1
        else:
            missed += 1

    clocked.does = miss
    answers = await asyncio.gather(*(clocked.ask("/v1/requests/nobody") for _ in range(200)))
    late = sum(status == 429 for status, _ in answers)  # arrived when no budget was left
    assert missed + refused + late == 200
    assert refused + late > 100
    assert history.num_read <= 2 * REQUESTS_PER_READ * BURST_S * PER_S < 200 * num
    clocked.s += 2 * BURST_S
    before = missed
    await clocked.ask("/v1/requests/nobody")
    assert missed == before + 1, "one at a time they are looked for to the end"


async def test_of_many_tenants_no_more_is_read_than_is_looked_at(bus: Bus) -> None:
    history, tenants, looked = CountedHistory(bus._redis, bus.keys), [f"t{number}" for number in range(50)], 0
    pipe = bus._redis.pipeline(transaction=False)
    end = m.HistoryEntry("r", "r", "", "interactive", "completed", "stop", "", "w", 1, 0, 1, 0, 1, 1, 2)
    for tenant in tenants:
        for number in range(40):
            pipe.xadd(bus.keys.history(tenant), {"b": m.encode(end)}, id=f"{1000 + number}-1")
        pipe.expire(bus.keys.history(tenant), 60)
    await pipe.execute()
    async for _ in history.walk(tenants, 0, 0, None):
        looked += 1
        if looked == 200:
            break
    assert history.num_read <= 4 * 2 * len(tenants) + 2 * looked
    async for _ in history.walk(tenants, 0, 0, None):
        looked += 1
    assert looked == 200 + 50 * 40, "and all are found in the end"


async def test_pages_that_show_nothing_cost_what_was_looked_at(bus: Bus) -> None:
    """On any list, omitted entries, of other tenants or filtered, are charged for too."""
    caller, num = Caller(Tenant(name="a", adapters=("none-*",)), ("infer",)), 512
    pipe = bus._redis.pipeline(transaction=False)
    for i in range(num):
        alias = m.Alias(name=f"one-{i}", state="on_disk", digest="ab" * 32, source=f"local:one-{i}", created_ms=1)
        pipe.hset(bus.keys.adapters, private_name(alias.name, ""), m.encode(alias))
        rid = f"{i:032x}-0"
        pipe.hset(
            bus.keys.req(rid),
            mapping={"state": "completed", "tenant": "b", "cls": "interactive", "epoch": 1, "n_prompt": 1},
        )
        pipe.expire(bus.keys.req(rid), 60)
        job = m.Job(
            jid=f"job_{i}", endpoint=COMPLETIONS, tenant="a", model="base", created_ms=1, expires_ms=2, rids=[rid]
        )
        pipe.hset(bus.keys.job(job.jid), "b", m.encode(job))
        pipe.expire(bus.keys.job(job.jid), 60)
        pipe.zadd(bus.keys.jobs("a"), {job.jid: i})
        pipe.hset(bus.keys.usage(DAY, "a"), f'["m{i}","","base",0]', "1 1 1 1")
        file = m.File(
            id=f"file-{i}", tenant="a", filename="f", purpose="batch", num_bytes=1, created_ms=1, expires_ms=0
        )  # fmt: skip
        pipe.set(bus.keys.file(file.id), m.encode(file), ex=60)
        pipe.zadd(bus.keys.files("a"), {file.id: i})
        end = m.HistoryEntry(rid, rid, "", "interactive", "completed", "stop", "", "w", 1, 0, 1, 0, 1, 1, 2)
        pipe.xadd(bus.keys.history("a"), {"b": m.encode(end)})
    for key in (bus.keys.history("a"), bus.keys.usage(DAY, "a"), bus.keys.jobs("a"), bus.keys.files("a")):
        pipe.expire(key, 60)
    await pipe.execute()

    async def none_of(page: Awaitable[dict[str, Any]]) -> None:
        assert (await page)["data"] == []

    async def usage() -> None:
        query = f"start_time={DAY * 86_400}&limit=1&models=another".encode()
        request = Request({"type": "http", "query_string": query, "headers": [], CALLER: caller})
        [day] = orjson.loads((await UsageEndpoints(bus.usage).usage(request)).body)["data"]
        assert day["results"] == []

    catalogue = CatalogueCopy(bus)
    assert await catalogue.page("", 1, caller.sees) == ([], False)
    assert await cost_of("a", lambda: catalogue.page("", 1, caller.sees)) == pytest.approx(num / NAMES_PER_READ)
    listed = RequestList(bus)
    cost = await cost_of("a", lambda: none_of(listed.page(caller, Filters(q="another"), 10, "")))
    assert cost >= num / REQUESTS_PER_READ
    pipeline: Any = SimpleNamespace(bus=bus, settings=SimpleNamespace(keepalive_s=1.0))
    apis: Any = {COMPLETIONS: SimpleNamespace(generates=True)}
    jobs = Jobs(pipeline, apis)
    assert await cost_of("a", lambda: none_of(jobs.list(caller, "failed", 100, None))) >= num / REQUESTS_PER_READ
    files: Any = SimpleNamespace(_bus=bus)
    page = partial(FileService.list, files, caller, "vision", 10_000, None, oldest_first=True)
    assert await cost_of("a", lambda: none_of(page())) == num / FILES_PER_READ
    assert await cost_of("a", usage) == pytest.approx(num / ROWS_PER_READ, abs=1)
