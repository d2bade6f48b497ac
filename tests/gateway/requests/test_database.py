"""The history database returns what was written, within limits and by tenant, with SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from helpers.waiting import wait_until
from sqlalchemy import text as sql
from sqlalchemy.dialects import postgresql

from gateway.requests import database as tables
from gateway.requests.database import PAGE, READS_OF_TENANT, READS_WAITING, REQUESTS, STATEMENTS, Database, url_of
from protocol.queue.archive import Past
from protocol.queue.history import MAX_REFUSALS, Place
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Overloaded, Unavailable

POSTGRES = os.environ.get("LORAFLEET_TEST_POSTGRES", "")
"""URL of an empty PostgreSQL database for these tests, in one process at a time."""


def end(rid: str, ms: int, tenant: str = "t", *, seq: int = 0, mark: str = "m", **more: Any) -> Past:
    values = {"state": "completed", "finish": "stop", "error": "", "worker": "w", **more}
    entry = m.HistoryEntry(
        rid=rid, call=rid, row='["pirate","d7","tiny/base",0]', cls="interactive", num_prompt_tokens=3,
        num_cached_tokens=1, num_output_tokens=5.0, attempts=0, submitted_ms=1, first_ms=2, ended_ms=ms, **values,
    )  # fmt: skip
    return Past(tenant, Place(ms, seq, mark), entry)


@pytest.fixture(params=["sqlite", *(["postgresql"] if POSTGRES else [])])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/data/history.db" if request.param == "sqlite" else POSTGRES


@pytest_asyncio.fixture
async def database(url: str) -> AsyncIterator[Database]:
    found = Database(url)
    await found.prepare()
    async with found._begun() as connection:
        await connection.execute(REQUESTS.delete())
    yield found
    await found.close()


@pytest.fixture
def silent() -> Iterator[str]:
    """Yield the URL of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"postgresql://nobody@127.0.0.1:{server.getsockname()[1]}/history"


async def ids_of(database: Database, tenant: str | None, since: int = 0, until: int = 0) -> list[str]:
    return [entry.rid async for _, _, entry in database.walk(tenant, since, until, None) if entry is not None]


async def test_what_is_read_is_what_was_written(database: Database) -> None:
    first, second = end("a-0", 20, error='{"message":"x"}', endpoint="/v1", status=404), end("b-0", 10)
    await database.write([(first, b"one"), (second, None), (end("c-0", 30, "other"), b"two")])
    found = [one async for one in database.walk("t", 0, 0, None)]
    assert found == [(one.place, "t", one.entry) for one in (first, second)]
    assert await ids_of(database, None) == ["c-0", "a-0", "b-0"]
    assert await ids_of(database, None, 20, 30) == ["a-0"]
    assert [entry async for _, _, entry in database.walk("t", 0, 0, first.place)] == [second.entry]
    assert await database.find("t", {"c-0", "b-0"}) == ("t", second.entry)
    assert await database.find("t", {"c-0"}) is None
    assert (await database.find(None, {"c-0"}) or ("",))[0] == "other"
    assert [await database.text(*one) for one in (("t", "a-0"), ("t", "b-0"), ("t", "c-0"))] == [b"one", None, None]
    await database.delete_texts([("t", "a-0"), ("t", "c-0")])
    assert await database.text("t", "a-0") is None
    assert await database.text("other", "c-0") == b"two"


async def test_an_entry_that_is_written_again_keeps_its_text(database: Database) -> None:
    await database.write([(end("a-0", 10), b"text")])
    await database.write([(end("a-0", 10), None), (end("b-0", 11), None)])
    assert await database.text("t", "a-0") == b"text"
    assert await ids_of(database, "t") == ["b-0", "a-0"]


async def test_a_refused_call_takes_no_requests_place(database: Database) -> None:
    refused = end("a-0", 99, mark="r", state="refused")
    await database.write([(end("a-0", 10), b"text"), (refused, None), (end("a-0", 98, "u", state="refused"), None)])
    for tenant in ("t", None):
        owner, entry = await database.find(tenant, {"a-0"}) or ("", None)
        assert owner == "t"
        assert entry is not None
        assert entry.state == "completed"
    assert await database.text("t", "a-0") == b"text"
    assert await database.text("u", "a-0") is None


async def test_pages_have_each_entry_once_also_of_one_millisecond(database: Database) -> None:
    rows = [end(f"{mark}{seq}", 10, seq=seq, mark=mark) for seq in range(PAGE) for mark in "abc"]
    await database.write([(one, None) for one in rows])
    places = [place async for place, _, _ in database.walk("t", 0, 0, None)]
    assert places == sorted((one.place for one in rows), key=lambda one: (-one.seq, one.mark))
    for at in (0, PAGE, len(places) - 1):
        assert [place async for place, _, _ in database.walk(None, 0, 0, places[at])] == places[at + 1 :]


async def test_what_is_too_old_or_too_much_is_deleted(database: Database) -> None:
    await database.write([(end(f"t{number}", number), b"x" * 100) for number in range(230)])
    await database.write([(end(f"r{number}", number, mark="r", state="refused"), None) for number in range(5)])
    await database.write([(end("o", 500, "other"), b"x" * 100)])
    assert not await database.delete_before(5)
    assert len(await ids_of(database, "t")) == 225
    assert not await database.trim("t", 10, 350)
    assert await ids_of(database, "t") == [f"t{number}" for number in range(229, 219, -1)]
    kept = [await database.text("t", f"t{number}") is not None for number in range(229, 219, -1)]
    assert kept == [True] * 3 + [False] * 7
    assert await database.text("other", "o") is not None
    await database.delete_before(1000)
    assert await ids_of(database, None) == []


async def test_much_that_is_too_much_is_said_to_be_more(database: Database) -> None:
    rows = [(end(f"t{number}", number), None) for number in range(tables.DELETED_AT_ONCE + 20)]
    await database.write(rows)
    assert await database.trim("t", 10, 1)
    assert not await database.trim("t", 10, 1)
    assert len(await ids_of(database, "t")) == 10


async def test_refused_calls_have_limits_of_their_own(database: Database) -> None:
    refused = [end(f"r{number}", 100 + number, mark="r", state="refused") for number in range(MAX_REFUSALS + 20)]
    await database.write([(one, None) for one in refused])
    await database.write([(end(f"t{number}", number), None) for number in range(5)])
    await database.trim("t", 100, 1)
    found = await ids_of(database, "t")
    assert found[-6:] == ["r20", "t4", "t3", "t2", "t1", "t0"]
    assert len(found) == MAX_REFUSALS + 5


async def test_texts_of_strangers_are_values(database: Database) -> None:
    nasty = "'); DROP TABLE requests; --\0é😀\ud7ff"
    await database.write([(end(nasty, 10, f"t{nasty}", error=nasty, endpoint=nasty, status=404), None)])
    [(_, tenant, entry)] = [found async for found in database.walk(f"t{nasty}", 0, 0, None)]
    assert entry is not None
    assert (entry.rid, entry.error, entry.endpoint) == (nasty, nasty, nasty)
    assert tenant == f"t{nasty}".replace("\0", "\ufffd")
    assert await database.find(None, {nasty, "x"}) is not None
    long = "x" * 100_000
    await database.write([(end(long, 11, error=long), None)])
    assert await ids_of(database, None) == [long, nasty]


async def test_what_another_release_wrote_is_told_as_unreadable(database: Database) -> None:
    await database.write([(end("a", 10), None), (Past("t", Place(11, 0, "m"), None), None)])
    async with database._begun() as connection:
        await connection.execute(REQUESTS.update().values(entry='{"rid":"a","news":1}'))
    assert [entry async for _, _, entry in database.walk("t", 0, 0, None)] == [None]
    assert await database.find("t", {"a"}) is None


async def test_a_deleted_text_is_in_no_file_of_an_open_database(tmp_path: Path) -> None:
    (path := tmp_path / "history.db").touch(mode=0o644)
    database = Database(f"sqlite:///{path}", timeout_s=0.4)

    def files() -> list[Path]:
        return list(tmp_path.iterdir())

    await database.prepare()
    secret = b"a secret that must go"
    await database.write([(end(f"r{number}", number), secret * 100) for number in range(20)])
    assert [file.stat().st_mode & 0o777 for file in files()] == [0o600] * 3
    which = [("t", f"r{number}") for number in range(20)]
    with closing(sqlite3.connect(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM requests").fetchone()
        assert not await database.delete_texts(which), "a reader needs what was there"
    assert await database.delete_texts(which)
    assert not any(secret in file.read_bytes() for file in files())
    await database.close()


async def test_a_file_of_sqlite_is_its_users_alone_and_forgets_what_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "data" / "history.db"
    database = Database(f"sqlite:///{path}")
    await database.prepare()
    await database.write([(end("a-0", 10), b"secret words" * 9)])
    assert {one.stat().st_mode & 0o077 for one in path.parent.iterdir()} == {0}
    await database.delete_texts([("t", "a-0")])
    await database.close()
    assert b"secret words" not in path.read_bytes()


@pytest.mark.parametrize("name", ["own", "all", "own named", "text"])
async def test_reads_go_by_an_index(tmp_path: Path, name: str) -> None:
    database = Database(f"sqlite:///{tmp_path}/history.db")
    await database.prepare()
    asked: Any = STATEMENTS[name]
    if "named" in name:
        asked = asked.params(ids=["a", "b"], owner="t")
    statement = str(asked.compile(database._engine.sync_engine, compile_kwargs={"render_postcompile": True}))
    async with database._begun() as connection:
        plan = (await connection.execute(sql(f"EXPLAIN QUERY PLAN {statement.replace('?', '1')}"))).all()
    await database.close()
    assert "SEARCH requests USING" in str(plan)
    assert "SCAN requests" not in str(plan)


def test_every_statement_is_sql_of_postgresql() -> None:
    statements: dict[str, Any] = {**STATEMENTS, "add": tables._ADD["postgresql"]}
    texts = {name: str(one.compile(dialect=postgresql.dialect())) for name, one in statements.items()}
    assert "OFFSET %(most)s" in texts["many"]
    assert "sum(length(requests.text)) OVER (ORDER BY" in texts["long"]
    for name in ("text", "own", "own named", "many", "many refused", "long", "forget"):
        assert "requests.tenant = %(owner)s" in texts[name], name
    assert "ON CONFLICT (tenant, ms, seq, mark) DO NOTHING" in texts["add"]


GOOD = {
    "sqlite:///history.db": "history.db",
    "sqlite:////var/lib/history.db": "/var/lib/history.db",
    "postgresql://fleet@db.example:5433/history": "history",
    "postgresql:///history": "history",
}


@pytest.mark.parametrize("url", GOOD)
def test_urls_that_are_taken(url: str) -> None:
    found = url_of(url)
    assert found.database == GOOD[url]
    assert found.drivername in tables.DRIVERS.values()


BAD = (
    "", "history.db", "mysql://u@h/d", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://host/file",
    "sqlite://user@/file", "sqlite:///a\0b", "sqlite:///f.db?mode=ro", "postgresql://u@h", "postgresql://u@h/",
    "postgresql://u@h:abc/d", "postgresql://u@h/d?sslmode=require", "postgresql://u@h/d?password=secret",
    "postgresql://u@h/d?host=other", "postgresql://u@h/d?timeout=abc", "postgresql://u:@h/d",
    "postgresql+psycopg://u@h/d", "sqlite+aiosqlite:///f.db", "://", "postgresql://[::1/d",
)  # fmt: skip


@pytest.mark.parametrize("url", BAD)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(BadRequest, match="--history"):
        Database(url)


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(BadRequest, match="PGPASSFILE") as raised:
        Database("postgresql://u:hunter2@h/d")
    assert "hunter2" not in str(raised.value)


def test_a_file_that_cannot_be_made_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="--history"):
        Database(f"sqlite:///{tmp_path}/file/history.db")


async def test_a_server_that_never_answers_is_given_up(silent: str) -> None:
    database = Database(silent, timeout_s=0.05)
    for what in (
        database.check(),
        database.prepare(),
        database.find("t", {"a"}),
        database.write([(end("a", 1), None)]),
    ):
        with pytest.raises(Unavailable):
            await what
    await database.close()


async def test_one_tenants_reads_leave_room_for_anothers(silent: str) -> None:
    database = Database(silent, timeout_s=60.0)
    greedy = [asyncio.create_task(database.find("a", {"x"})) for _ in range(READS_WAITING)]
    refused, _ = await asyncio.wait(greedy, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(Overloaded, match="reads of the history"):
        await next(iter(refused))
    assert database._slots._held == {"a": READS_OF_TENANT}
    other = asyncio.create_task(database.find("b", {"x"}))
    await wait_until(lambda: database._slots._held["b"] == 1, "the other tenant's read runs")
    for task in (*greedy, other):
        task.cancel()
    await asyncio.gather(*greedy, other, return_exceptions=True)
    assert not database._slots._held
    await database.close()


async def test_a_database_that_comes_back_is_used_again(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/data/history.db")
    await database.prepare()
    (tmp_path / "data").rename(tmp_path / "away")
    await database._engine.dispose()
    with pytest.raises(Unavailable, match="database"):
        await database.write([(end("a", 1), None)])
    (tmp_path / "away").rename(tmp_path / "data")
    await database.write([(end("a", 1), None)])
    assert await ids_of(database, "t") == ["a"]
    await database.close()
