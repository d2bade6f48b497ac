"""The catalogue: the fleet's adapter names and the contents to which they refer.

Only this module writes `Keys.adapters` (aliases by field) and `Keys.adapter` (records by digest).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import msgspec

from protocol.queue.bus import Bus, decode, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import ProtocolError
from protocol.wire.keys import private_name

logger = logging.getLogger(__name__)


def field_of(alias: m.Alias) -> str:
    """Return the hash field of an alias in the catalogue."""
    return private_name(alias.name, alias.tenant)


def _is_same(known: m.AdapterRecord | None, record: m.AdapterRecord) -> bool:
    """Return whether two records are equal apart from time and source."""
    if known is None:
        return False
    return msgspec.structs.replace(known, created_ms=record.created_ms, source=record.source) == record


def _is_of_a_name(event: bytes) -> bool:
    """Return whether an event may concern the catalogue; an undecodable one may."""
    try:
        return decode(event, m.AdapterEvent).name != ""
    except ProtocolError:
        return True


class Catalogue:
    """The aliases of the fleet as published by all stores, and those published by this store."""

    def __init__(self, bus: Bus, sid: str, record_kept_s: float = 60.0) -> None:
        """Start empty, for the store `sid`.

        record_kept_s: seconds after its last name until a content's record is deleted; requests accepted before may
        still need it.
        """
        self._bus = bus
        self._sid = sid
        self._record_kept_s = record_kept_s
        self._mine: dict[str, m.Alias] = {}  # aliases published by this process, by field
        self._records: dict[str, m.AdapterRecord] = {}
        self._run_id: str = ""
        self._last_event = ""  # id of the last event seen; "": none
        self._unnamed: dict[str, float] | None = None  # digest without a name -> when its record is deleted, monotonic
        self.aliases: dict[str, m.Alias] = {}  # by field; aliases of all stores as last loaded

    async def load(self) -> bool:
        """Load what all stores have published; return whether anything has changed since the last load.

        If Redis has lost this store's aliases, they are published again.
        """
        news = await self._bus.adapters.news(self._last_event)
        lost = news.num_names == 0 or news.run_id != self._run_id
        if lost and self._mine:
            logger.warning("Redis was restarted or flushed: republishing %d names", len(self._mine))
            await self._write(self._mine.values())
        self._run_id = news.run_id
        if news.events:
            self._last_event = news.events[-1][0]
        elif lost:
            self._last_event = ""
        # Every change of the catalogue is followed by an event with a name; events of workers have none.
        if not lost and not any(_is_of_a_name(raw) for _, raw in news.events):
            return False
        before = {alias.digest for alias in self.aliases.values()}
        self.aliases = {field_of(alias): alias for alias in await self._bus.adapters.aliases(tenant=None)}
        self._note_unnamed(before)
        return True

    def _note_unnamed(self, digests: Iterable[str]) -> None:
        if self._unnamed is not None:
            named = {alias.digest for alias in self.aliases.values()}
            at_s = time.monotonic() + self._record_kept_s
            self._unnamed.update({digest: at_s for digest in digests if digest and digest not in named})

    async def sweep(self) -> None:
        """Delete the records of contents to which no name refers, unless one is published in between."""
        if self._unnamed is None:  # records left by earlier processes
            self._unnamed = {}
            self._note_unnamed(await self._bus.adapters.known_digests())
        due = [digest for digest, at_s in self._unnamed.items() if at_s <= time.monotonic()]
        if not due:
            return
        gone = await self._bus.adapters.delete_records(due)
        if gone is None:
            return  # a name was published in between: the next sweep tries again
        for digest in due:
            del self._unnamed[digest]
        for digest in gone:
            self._records.pop(digest, None)

    async def publish(self, alias: m.Alias, record: m.AdapterRecord | None = None) -> None:
        """Publish an alias with its record atomically: readers see either the old state or the new one."""
        old = self.aliases.get(field_of(alias))
        created = old.created_ms if old else now_ms()
        alias = msgspec.structs.replace(alias, created_ms=created, changed_ms=now_ms())
        is_new = record is not None and not _is_same(await self.record(record.digest), record)
        if record is not None:
            self._records[record.digest] = record
        self._mine[field_of(alias)] = alias
        if old is not None and msgspec.structs.replace(old, changed_ms=alias.changed_ms) == alias:
            if is_new:  # same content with another record, for another base model
                await self._write([old])
            return
        await self._write([alias])
        self.aliases[field_of(alias)] = alias
        if old is not None:
            self._note_unnamed([old.digest])
        kind = "failed" if alias.state == "failed" else "alias"
        await self._bus.adapters.announce(
            m.AdapterEvent(kind=kind, name=alias.name, digest=alias.digest, source=self._sid)
        )

    async def announce(self, aliases: Iterable[m.Alias]) -> None:
        """Publish names that are not in the catalogue yet, so that requests for them wait instead of failing."""
        now = now_ms()
        new = [
            msgspec.structs.replace(alias, created_ms=now, changed_ms=now)
            for alias in aliases
            if field_of(alias) not in self.aliases
        ]
        if new:
            await self._write(new)
            self.aliases |= {field_of(alias): alias for alias in new}

    async def _write(self, aliases: Iterable[m.Alias]) -> None:
        await self._bus.adapters.publish((alias, self._records.get(alias.digest)) for alias in aliases)

    async def remove(self, field: str) -> None:
        """Remove a name. Its content stays on disk until the space is needed."""
        self._mine.pop(field, None)
        alias = self.aliases.pop(field, None)
        if alias is None:
            return
        await self._bus.adapters.withdraw(field)
        self._note_unnamed([alias.digest])
        await self._bus.adapters.announce(
            m.AdapterEvent(kind="removed", name=alias.name, digest=alias.digest, source=self._sid)
        )

    async def record(self, digest: str) -> m.AdapterRecord | None:
        """Return the record of a content, whichever store published it; None for an unknown digest."""
        return self._records.get(digest) or await self._bus.get(self._bus.keys.adapter(digest), m.AdapterRecord)
