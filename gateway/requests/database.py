"""The history of requests in a database, SQLite or PostgreSQL (`--history`): a copy that outlives the queue's.

One gateway at a time writes it, see `archiver.py`. A row's key is its entry's place in the tenant's history, so that
copying an entry twice changes nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict
from sqlalchemy import (
    BigInteger,
    Column,
    Delete,
    Executable,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    event,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from protocol.queue.archive import Past
from protocol.queue.history import MAX_REFUSALS, Place
from protocol.runtime.fair_slots import RETRY_S, FairSlots
from protocol.runtime.free_space import Reserve
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, Overloaded, Unavailable

DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
EXAMPLE = "--history takes sqlite:///FILE or postgresql://USER@HOST/NAME"

TIMEOUT_S = 5.0
"""Maximum seconds for a read or write; after them the database counts as unreachable."""

PAGE, DELETED_AT_ONCE = 32, 1000
"""Rows per read, and per deletion."""

READS, READS_OF_TENANT, READS_WAITING = 8, 2, 64
"""Concurrent reads in total and per tenant, and reads that may wait."""

MAX_ID = 200
"""Maximum characters of an id; a refused call has an id that its client chose."""

REQUESTS = Table(
    "requests",
    MetaData(),
    Column("tenant", Text, nullable=False),
    Column("ms", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("mark", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("entry", Text, nullable=False),
    Column("text", LargeBinary),
    PrimaryKeyConstraint("tenant", "ms", "seq", "mark"),
    Index("requests_by_time", "ms", "seq", "mark"),
    Index("requests_by_id", "id"),
)
"""One row per ended request or refused call. `ms`, `seq` and `mark` are its `Place`, where `ms` is the unix ms of its
end. `state` and `id` repeat fields of `entry`, which is a `messages.HistoryEntry` with the model's name, as JSON.
`text` is a `messages.KeptText`, msgpack, possibly sealed."""

_C = REQUESTS.c
_KEY = (_C.tenant, _C.ms, _C.seq, _C.mark)
_LATEST = (_C.ms.desc(), _C.seq.desc(), _C.mark)
_REFUSED = "refused"
_FIELDS = frozenset(m.HistoryEntry.__struct_fields__)

# Statements are built once: building one takes longer than running it. All values are bound parameters.
_LAST_MS = 1 << 62
_AFTER = or_(
    _C.ms < bindparam("after_ms"),
    and_(
        _C.ms == bindparam("after_ms"),
        or_(
            _C.seq < bindparam("after_seq"),
            and_(_C.seq == bindparam("after_seq"), _C.mark > bindparam("after_mark")),
        ),
    ),
)
_LISTED = (
    select(*_KEY, _C.entry)
    .where(
        _C.ms >= bindparam("since"), _C.ms < bindparam("until"), _AFTER
    )  # given two upper bounds, SQLite uses the weaker one
    .order_by(*_LATEST)
    .limit(PAGE)
)
_NAMED = (
    select(_C.tenant, _C.entry)
    .where(_C.id.in_(bindparam("ids", expanding=True)))
    .order_by(_C.state == _REFUSED, *_LATEST)
    .limit(2)
)
_OWN = _C.tenant == bindparam("owner")
_TEXT = select(_C.text).where(_OWN, _C.id == bindparam("rid"), _C.text.is_not(None)).order_by(*_LATEST).limit(1)
_SUMS = (
    select(*_KEY, func.sum(func.length(_C.text)).over(order_by=_LATEST).label("sum"))
    .where(_OWN, _C.text.is_not(None))
    .subquery()
)
_BEYOND = select(*_KEY).where(_OWN).order_by(*_LATEST).offset(bindparam("most", type_=Integer)).limit(DELETED_AT_ONCE)


def _deleting(rows: Select[*tuple[Any, ...]]) -> Delete:
    return delete(REQUESTS).where(tuple_(*_KEY).in_(rows))


STATEMENTS: dict[str, Executable] = {
    "all": _LISTED,
    "own": _LISTED.where(_OWN),
    "named": _NAMED,
    "own named": _NAMED.where(_OWN),
    "text": _TEXT,
    "forget": update(REQUESTS).where(_OWN, _C.id == bindparam("rid")).values(text=None),
    "old": _deleting(select(*_KEY).where(_C.ms < bindparam("before")).order_by(_C.ms).limit(DELETED_AT_ONCE)),
    "many": _deleting(_BEYOND.where(_C.state != _REFUSED)),
    "many refused": _deleting(_BEYOND.where(_C.state == _REFUSED)),
    "long": update(REQUESTS)
    .where(tuple_(*_KEY).in_(select(*(_SUMS.c[one.key] for one in _KEY)).where(_SUMS.c.sum > bindparam("most"))))
    .values(text=None),
    "check": select(_C.ms).limit(1),
}
"""All statements except the insertion of rows."""

_ADD = {
    "sqlite": sqlite.insert(REQUESTS).on_conflict_do_nothing(index_elements=list(_KEY)),
    "postgresql": postgresql.insert(REQUESTS).on_conflict_do_nothing(index_elements=list(_KEY)),
}


class Database:
    """The history's database. Raises Unavailable if it fails, and Overloaded for readers."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, reserve: Reserve | None = None) -> None:
        """url: the value of `--history`. reserve: free space to keep on the disk of SQLite's file; None: none.

        Raises BadRequest if the URL cannot be used, ImportError without its driver.
        """
        self._url = url_of(url)
        self._timeout_s = timeout_s
        self._reserve = reserve or Reserve(0)
        self._slots = FairSlots(READS, READS_OF_TENANT, READS_WAITING)
        try:
            more: dict[str, Any] = {"pool_size": READS + 2, "max_overflow": 0, "pool_timeout": timeout_s}
            if self._is_sqlite:
                more["connect_args"] = {"timeout": timeout_s / 2}  # waiting for a lock cannot be cancelled
                _make_private(Path(self._url.database or ""))
            self._engine = create_async_engine(self._url, **more)
            if self._is_sqlite:
                event.listen(self._engine.sync_engine, "connect", _set_up_sqlite)
        except (SQLAlchemyError, OSError, TypeError, ValueError) as error:
            raise BadRequest(f"--history {brief(url)}: {error}") from error
        self._add = _ADD[self._url.get_backend_name()]

    @property
    def _is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    async def close(self) -> None:
        """Close all connections; those that do not respond in time are abandoned."""
        async with _failing_as_unavailable(self._timeout_s):
            await self._engine.dispose()

    @asynccontextmanager
    async def _begun(self) -> AsyncGenerator[AsyncConnection]:
        """Yield a connection within a transaction. Raises Unavailable."""
        async with _failing_as_unavailable(self._timeout_s), self._engine.begin() as connection:
            yield connection

    # ------------------------------------------------------------ writing: one gateway at a time

    async def prepare(self) -> None:
        """Create the table if it does not exist. Raises Unavailable."""
        async with self._begun() as connection:
            await connection.run_sync(REQUESTS.metadata.create_all)

    def check_room(self) -> None:
        """Raise NoRoom where the file would take what is kept free of its disk; what is deleted makes no room there."""
        if self._is_sqlite:
            self._reserve.check(Path(self._url.database or ""))

    async def write(self, rows: Sequence[tuple[Past, bytes | None]]) -> None:
        """Insert entries with their texts, except unreadable ones and those already stored. Raises Unavailable."""
        values = [_values(past, entry, text) for past, text in rows if (entry := past.entry) is not None]
        if values:
            async with self._begun() as connection:
                await connection.execute(self._add, values)

    async def delete_texts(self, which: Sequence[tuple[str, str]]) -> bool:
        """Delete the texts of requests, each given by tenant and id. Raises Unavailable.

        Return False if SQLite's log may still contain them because of a concurrent reader: then call it again.
        """
        async with self._begun() as connection:
            await connection.execute(STATEMENTS["forget"], [{"owner": tenant, "rid": rid} for tenant, rid in which])
        if not self._is_sqlite:
            return True
        async with _failing_as_unavailable(self._timeout_s), self._engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            is_busy, *_ = (await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")).one()
        return not is_busy

    async def delete_before(self, ms: int) -> bool:
        """Delete up to DELETED_AT_ONCE rows that ended before a unix time in ms. Return whether there may be more."""
        return await self._deleted("old", before=ms)

    async def trim(self, tenant: str, max_requests: int, max_text_bytes: int) -> bool:
        """Delete a tenant's oldest rows and texts beyond its limits, at most DELETED_AT_ONCE rows of a kind.

        Return whether there may be more. Raises Unavailable.
        """
        more = await self._deleted("many", owner=tenant, most=max_requests)
        more |= await self._deleted("many refused", owner=tenant, most=MAX_REFUSALS)
        async with self._begun() as connection:
            await connection.execute(STATEMENTS["long"], {"owner": tenant, "most": max_text_bytes})
        return more

    async def _deleted(self, what: str, **values: Any) -> bool:
        async with self._begun() as connection:
            return (await connection.execute(STATEMENTS[what], values)).rowcount == DELETED_AT_ONCE

    # ------------------------------------------------------------ reading: tenants share the slots

    async def check(self) -> None:
        """Raise Unavailable unless the database can be read."""
        async with self._begun() as connection:
            await connection.execute(STATEMENTS["check"])

    async def walk(
        self, tenant: str | None, since_ms: int, until_ms: int, after: Place | None
    ) -> AsyncIterator[tuple[Place, str, m.HistoryEntry | None]]:
        """Yield the ends of a tenant, or of all for None, in a period, latest first; as `History.walk`."""
        place, what = after or Place(_LAST_MS, 0, ""), "all" if tenant is None else "own"
        while True:
            values = {"after_ms": place.ms, "after_seq": place.seq, "after_mark": place.mark}
            until = min(until_ms or _LAST_MS, place.ms + 1)
            rows = await self._read(tenant, what, since=since_ms, until=until, **values)
            for name, ms, seq, mark, entry in rows:
                place = Place(ms, seq, mark)
                yield place, name, _entry(entry)
            if len(rows) < PAGE:
                return

    async def find(self, tenant: str | None, ids: set[str]) -> tuple[str, m.HistoryEntry] | None:
        """Return tenant and entry of the request with one of these ids, of one tenant or, for None, of any.

        Requests are preferred to refused calls, whose ids are chosen by clients.
        """
        what = "named" if tenant is None else "own named"
        for owner, entry in await self._read(tenant, what, ids=sorted(_plain(one) for one in ids)):
            if (found := _entry(entry)) is not None:
                return owner, found
        return None

    async def text(self, tenant: str, rid: str) -> bytes | None:
        """Return the stored text of a tenant's request, None if there is none."""
        rows = await self._read(tenant, "text", rid=_plain(rid))
        return rows[0][0] if rows else None

    async def _read(self, tenant: str | None, what: str, **values: Any) -> Sequence[Any]:
        """Return the rows of a statement. Raises Unavailable; Overloaded if too many of the tenant's reads wait.

        tenant: whose rows are read; None: all tenants'.
        """
        try:
            async with _failing_as_unavailable(self._timeout_s):
                await self._slots.take(tenant or "")
        except Overloaded as error:
            raise Overloaded("too many reads of the history are waiting; retry later", RETRY_S, "reads") from error
        try:
            async with self._begun() as connection:
                own = {"owner": _plain(tenant)} if tenant is not None else {}
                return (await connection.execute(STATEMENTS[what], {**own, **values})).all()
        finally:
            self._slots.give(tenant or "")


# ------------------------------------------------------------ URLs, files and values


def url_of(url: str) -> URL:
    """Return a database's URL with its async driver. Raises BadRequest."""
    try:
        found = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise BadRequest(f"{EXAMPLE}, not {brief(url)}") from error
    if found.password is not None:
        raise BadRequest("--history takes no password: put it into a file that PGPASSFILE names")
    if found.query:
        raise BadRequest("--history takes no parameters after a ?: PostgreSQL's clients have PGSSLMODE and its like")
    is_file = found.drivername == "sqlite"
    has_server = bool(found.username or found.host or found.port)
    name = found.database or ""
    if found.drivername not in DRIVERS or not name or "\0" in name or (is_file and (has_server or name == ":memory:")):
        raise BadRequest(f"{EXAMPLE}, not {brief(url)}")
    return found.set(drivername=DRIVERS[found.drivername])


def _make_private(path: Path) -> None:
    """Create the file if needed, and restrict it to its user. SQLite gives its companion files the same mode."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


def _set_up_sqlite(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
    cursor.execute("PRAGMA secure_delete=ON")  # overwrite deleted content
    cursor.close()


@asynccontextmanager
async def _failing_as_unavailable(timeout_s: float) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        cause = getattr(error, "orig", None) or error  # without the statement and its parameters
        text = (str(cause) or type(cause).__name__).split("\n", 1)[0][:200]
        raise Unavailable(f"the history's database cannot be used: {text}", code="no_history") from error


def _plain(text: str) -> str:
    """Return a text without NUL, which PostgreSQL does not accept."""
    return text.replace("\0", "\ufffd")


def _values(past: Past, entry: m.HistoryEntry, text: bytes | None) -> dict[str, Any]:
    place = past.place
    return {
        "tenant": _plain(past.tenant), "ms": place.ms, "seq": place.seq, "mark": place.mark,
        "id": _plain(entry.rid)[:MAX_ID], "state": _plain(entry.state), "text": text,
        "entry": msgspec.json.encode({**asdict(entry), "model": entry.model}).decode(),
    }  # fmt: skip


def _entry(raw: str) -> m.HistoryEntry | None:
    try:
        found: dict[str, Any] = msgspec.json.decode(raw, type=dict[str, Any])
        return m.HistoryEntry(**{name: value for name, value in found.items() if name in _FIELDS})
    except (msgspec.DecodeError, TypeError):  # written by another release
        return None
