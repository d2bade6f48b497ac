"""Ended requests are copied into the history database: by one gateway at a time, fairly, and despite its failures."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from helpers.script_queue import make_body, make_job, make_submit
from helpers.scripted_fleet import ScriptedFleet, gateway_client
from helpers.waiting import wait_until
from prometheus_client import REGISTRY
from sqlalchemy import event

from gateway.requests import archiver as loop
from gateway.requests.archiver import Archiver
from gateway.requests.database import Database
from gateway.requests.texts import KeptTexts
from gateway.text.own_files import OwnFacts
from protocol.queue.archive import Past
from protocol.queue.books.usage import CountedFor, usage_of
from protocol.queue.bus import Bus, now_ms
from protocol.queue.history import kept_for
from protocol.runtime.free_space import Reserve
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import NotFound, Unavailable

BODY = {"model": "base", "prompt": "the lazy dog sleeps", "max_tokens": 12, "ignore_eos": True}
URL = "sqlite:///{}/history.db"


class Bases:
    """Facts about adapters, one of which was removed; no files of a base model, as they may not be available yet."""

    @property
    def default(self) -> Bases:
        return self

    @property
    def own(self) -> Bases:
        return self

    async def facts(self, digest: str) -> OwnFacts:
        if digest == "gone":
            raise NotFound("it has left")
        return OwnFacts(f"texts of {digest}", 0, 0, 0)


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    found = Database(URL.format(tmp_path))
    yield found
    await found.close()


def make(bus: Bus, database: Database, gid: str = "one", **settings: Any) -> Archiver:
    values: dict[str, Any] = {"redis_url": bus.url, "history_text": 9, "history_s": 600, **settings}
    return Archiver(bus, gid, Settings(**values), database, Bases())  # type: ignore[arg-type]


async def end(bus: Bus, *rids: str, tenant: str = "t", text: int = 9, **more: object) -> None:
    counted = CountedFor(tenant, "base", "", "base", batch=False, days=1)
    usage = usage_of(counted, calls=1, prompt_tokens=3, has_output=True)
    for rid in rids:
        pairs = [(make_submit(rid, tenant=tenant, **more), make_body())]
        sent = await bus.submit(
            "interactive", pairs, max_queued=1000, usages=[usage], history=kept_for(600, 1000), text=text
        )
        assert sent == ("ok", None)
        assert await bus.finish(rid, "failed", "error")


async def rids_of(database: Database, tenant: str | None = "t") -> list[str]:
    return sorted([entry.rid async for _, _, entry in database.walk(tenant, 0, 0, None) if entry is not None])


def lost(what: str) -> float:
    return REGISTRY.get_sample_value("lorafleet_history_lost_total", {"what": what}) or 0.0


def behind_s() -> float:
    return REGISTRY.get_sample_value("lorafleet_history_behind_seconds") or 0.0


async def test_everything_is_copied_once_with_its_text(bus: Bus, database: Database) -> None:
    await end(bus, "a", "b")
    await end(bus, "o", tenant="other")
    await end(bus, "plain", text=0)
    archiver = make(bus, database)
    for _ in range(2):
        await archiver.look()
        assert await rids_of(database) == ["a", "b", "plain"]
    raw = await database.text("t", "a")
    assert raw is not None
    assert bus.archive.opened("t", "a", raw) == m.KeptText(make_body().prompt, b"", "", "")
    assert await database.text("other", "o") is not None
    assert await database.text("t", "plain") is None
    assert (archiver.problem, behind_s()) == ("", 0)


async def test_one_gateway_copies_and_the_next_takes_over(bus: Bus, database: Database, tmp_path: Path) -> None:
    second = Database(URL.format(tmp_path))
    first, other = make(bus, database), make(bus, second, "two")
    await end(bus, "a")
    await first.look()
    await end(bus, "b")
    await other.look()
    assert await rids_of(second) == ["a"], "it does not have the lease"
    await first.leave()
    await other.look()
    assert await rids_of(second) == ["a", "b"]
    await other.leave()


class Broken(Database):
    """A database that rejects writes while it is full, and all requests while it is away."""

    is_full = is_away = False

    async def check(self) -> None:
        if self.is_away:
            raise Unavailable("the history's database cannot be used: it is away")
        await super().check()

    async def write(self, rows: Sequence[tuple[Past, bytes | None]]) -> None:
        if self.is_full:
            raise Unavailable("the history's database cannot be used: the disk is full")
        await super().write(rows)


async def test_what_cannot_be_written_waits_and_every_gateway_says_so(bus: Bus, tmp_path: Path) -> None:
    database, second = Broken(URL.format(tmp_path)), Database(URL.format(tmp_path))
    first, other = make(bus, database), make(bus, second, "two")
    database.is_away = True
    with pytest.raises(Unavailable):
        await first.look()
    assert "it is away" in first.problem, "although nothing was to be written"
    database.is_away, database.is_full = False, True
    await first.look()
    assert first.problem == "", "nothing was to be written"
    await end(bus, "a")
    for _ in range(3):
        with pytest.raises(Unavailable):
            await first.look()
        await other.look()
        assert "disk is full" in first.problem
        assert "disk is full" in other.problem
    database.is_full = False
    await first.look()
    await other.look()
    assert (first.problem, other.problem) == ("", "")
    assert await rids_of(second) == ["a"]
    assert await second.text("t", "a") is not None
    await first.leave()
    await other.leave()


async def test_after_an_outage_tenants_that_are_silent_again_are_copied_too(bus: Bus, tmp_path: Path) -> None:
    database = Broken(URL.format(tmp_path))
    archiver = make(bus, database)
    await archiver.look()
    database.is_full = True
    await end(bus, "a")
    with pytest.raises(Unavailable):
        await archiver.look()
    await bus._redis.zadd(bus.keys.histories, {"t": now_ms() - 10 * loop.RECENT_MS})
    database.is_full = False
    await archiver.look()
    assert await rids_of(database) == ["a"]
    await archiver.leave()


async def test_a_long_backlog_of_a_silent_tenant_is_copied_whole(bus: Bus, database: Database) -> None:
    """Each pass copies a part, while the tenant has had no new entries for long."""
    rids = [f"r{number:03}" for number in range(80)]
    await end(bus, *rids)
    await bus._redis.zadd(bus.keys.histories, {"t": float(now_ms() - 2 * loop.RECENT_MS)})
    archiver = make(bus, database)
    for _ in range(6):
        await archiver.look()
    assert sorted(await rids_of(database)) == rids
    assert archiver._unfinished == {}


async def test_a_tenant_that_floods_delays_no_others_ends(bus: Bus, database: Database) -> None:
    await end(bus, *(f"a{number:03}" for number in range(2 * loop.ENDS_AT_ONCE)))
    await end(bus, "o", tenant="other")
    archiver = make(bus, database)
    await archiver.look()
    assert await rids_of(database, "other") == ["o"]
    assert len(await rids_of(database)) == loop.ENDS_AT_ONCE
    assert archiver._more.is_set(), "the next look is at once"
    assert behind_s() > 0
    await archiver.look()
    assert len(await rids_of(database)) == 2 * loop.ENDS_AT_ONCE


class Deleting(Database):
    """A database that is so slow that the owner deletes a text between its read and its write."""

    bus: Bus

    async def write(self, rows: Sequence[tuple[Past, bytes | None]]) -> None:
        assert [text is not None for _, text in rows] == [True]
        await self.bus.jobs.forget(make_job("j", "a"))
        await super().write(rows)


async def test_a_text_that_is_deleted_while_it_is_written_does_not_stay(bus: Bus, tmp_path: Path) -> None:
    database = Deleting(URL.format(tmp_path))
    database.bus = bus
    await end(bus, "a", stored=True)
    archiver = make(bus, database)
    await archiver.look()
    assert await rids_of(database) == ["a"]
    assert await database.text("t", "a") is None
    assert await bus.archive.deletions(9) == []
    await archiver.leave()


async def test_what_is_deleted_while_the_database_is_away_is_deleted_later(bus: Bus, tmp_path: Path) -> None:
    database = Broken(URL.format(tmp_path))
    archiver = make(bus, database)
    await end(bus, "a", stored=True)
    await archiver.look()
    database.is_full = True
    await end(bus, "b")
    await bus.jobs.forget(make_job("j", "a"))
    with pytest.raises(Unavailable):
        await archiver.look()
    assert await bus.archive.is_deleted("t", "a"), "nobody is shown it meanwhile"
    database.is_full = False
    await archiver.look()
    assert await database.text("t", "a") is None
    await archiver.leave()


class Copying(Database):
    """A database whose texts are deleted by the archiver just after they have been read."""

    archiver: Archiver

    async def text(self, tenant: str, rid: str) -> bytes | None:
        found = await super().text(tenant, rid)
        await self.archiver.look()
        return found


async def test_a_deleted_text_is_shown_to_nobody_while_it_is_being_deleted(bus: Bus, tmp_path: Path) -> None:
    database = Copying(URL.format(tmp_path))
    database.archiver = archiver = make(bus, database)
    await end(bus, "a", "b", stored=True)
    await archiver.look()
    # Without a resolver, which provides tokenizers, no text can be shown.
    texts = KeptTexts(SimpleNamespace(bus=bus, settings=archiver._settings), database)  # type: ignore[arg-type]
    request = {"id": "a", "tenant": "t", "state": "failed", "prompt_tokens": 3, "output_tokens": 0}
    await bus.jobs.forget(make_job("j", "a"))
    assert await texts.shown(request) is None
    await archiver.leave()


async def test_what_is_lost_is_counted(bus: Bus, database: Database) -> None:
    before = [lost(what) for what in loop.LOST]
    await end(bus, "expired", "deleted", stored=True)
    await end(bus, "adapter", digest="gone")
    await end(bus, "kept", digest="d7")
    await bus._redis.delete(bus.keys.req("expired"))
    await bus.jobs.forget(make_job("j", "deleted"))
    await bus._redis.xadd(bus.keys.history("t"), {"b": b"\xc1"})
    await make(bus, database).look()
    assert [lost(what) - one for what, one in zip(loop.LOST, before, strict=True)] == [1, 2, 0]
    raw = await database.text("t", "kept")
    assert raw is not None
    assert bus.archive.opened("t", "kept", raw).texts == "texts of d7"


class Trimmed(Database):
    """A database that records calls to `trim`, and fails the first time."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.trimmed: list[tuple[str, int, int]] = []

    async def trim(self, tenant: str, max_requests: int, max_text_bytes: int) -> bool:
        self.trimmed.append((tenant, max_requests, max_text_bytes))
        if len(self.trimmed) == 1:
            raise Unavailable("it is away")
        return False


async def test_tenants_are_trimmed_some_in_a_look(bus: Bus, tmp_path: Path) -> None:
    database = Trimmed(URL.format(tmp_path))
    settings = Settings(redis_url=bus.url, history_s=600, history_requests=100)
    archiver = Archiver(bus, "one", settings, database, Bases(), sweep_s=0.0)  # type: ignore[arg-type]
    num = loop.TRIMMED_AT_ONCE + 1
    for number in range(num):
        await end(bus, f"a{number}", tenant=f"t{number}")
    with pytest.raises(Unavailable):
        await archiver.look()
    await archiver.look()
    assert len(database.trimmed) == 1 + loop.TRIMMED_AT_ONCE
    await archiver.look()
    assert sorted(set(database.trimmed)) == [(f"t{number}", 100, 16 << 20) for number in range(num)]
    await archiver.leave()


async def test_calls_go_on_without_the_database_and_health_and_lists_say_so(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    async with gateway_client(bus, model_folder, history=f"sqlite:///{folder}/history.db", history_text=9) as http:

        async def status() -> tuple[str | None, int]:
            health = (await http.get("/health")).json()
            assert health["status"] == "ready"
            return health.get("history"), (await http.get("/v1/requests", params={"state": "ended"})).status_code

        async def is_well() -> bool:
            return await status() == (None, 200)

        await wait_until(is_well, "the database is used")
        with closing(sqlite3.connect(folder / "history.db")) as connection:
            connection.executescript("DROP TABLE requests; CREATE VIEW requests AS SELECT 1")

        async def is_away() -> bool:
            await http.post("/v1/completions", json=BODY)
            return (await status())[0] == "unavailable"

        await wait_until(is_away, "the gateway says that the database is away")
        done = await http.post("/v1/completions", json=BODY)
        assert done.status_code == 200
        refused = await http.get("/v1/requests", params={"state": "ended"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_history")
        shown = await http.get(f"/v1/requests/{done.json()['id']}")
        assert shown.status_code == 200
        assert "database" in shown.json()["text"]["problem"]


async def test_a_gateway_ends_while_its_database_hangs(bus: Bus) -> None:
    class Hanging(Database):
        async def prepare(self) -> None:
            await asyncio.Event().wait()

        async def close(self) -> None:
            raise Unavailable("the database does not answer")

    archiver = make(bus, Hanging("postgresql://nobody@127.0.0.1:1/history"))
    task = asyncio.create_task(archiver.look())
    await wait_until(lambda: bus._redis.exists(bus.keys.history_writer), "it copies")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await archiver.leave()
    assert await bus.archive.lead("two")


async def test_a_full_disk_loses_nothing(bus: Bus, database: Database) -> None:
    limits = iter((20, 1 << 20))  # pages of the file, by connection

    def limit(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA max_page_count={next(limits)}")
        cursor.close()

    event.listen(database._engine.sync_engine, "connect", limit)
    archiver = make(bus, database, history_text=0)
    rids = [f"a{number:03}" for number in range(10 * loop.ENDS_AT_ONCE)]

    async def fill() -> None:
        for begin in range(0, len(rids), loop.ENDS_AT_ONCE):
            await end(bus, *rids[begin : begin + loop.ENDS_AT_ONCE], text=0)
            await archiver.look()

    with pytest.raises(Unavailable, match="disk is full"):
        await fill()
    assert 0 < len(await rids_of(database)) < len(rids)
    await end(bus, "last", text=0)
    assert "disk is full" in archiver.problem
    await database._engine.dispose()
    await archiver.look()
    await archiver.look()
    assert archiver.problem == ""
    found = await rids_of(database)
    assert found == [*rids[: len(found) - 1], "last"]


async def test_a_disk_without_room_takes_no_more_and_gives_up_what_is_deleted(bus: Bus, tmp_path: Path) -> None:
    """The queue's log may be on the same disk: what tenants' calls add to the history leaves room for it."""
    free = 200
    database = Database(URL.format(tmp_path), reserve=Reserve(100, lambda _: free))
    archiver = make(bus, database)
    await end(bus, "a", stored=True)
    await archiver.look()
    free = 99
    await end(bus, "b")
    await bus.jobs.forget(make_job("j", "a"))
    with pytest.raises(Unavailable, match="100 are kept free"):
        await archiver.look()
    assert await rids_of(database) == ["a"]
    assert await database.text("t", "a") is None
    assert "100 are kept free" in archiver.problem
    free = 200
    await archiver.look()
    assert await rids_of(database) == ["a", "b"]
    await archiver.leave()
