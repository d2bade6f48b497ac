"""Copies ended requests and refused calls from the queue's history into the database of `--history`.

Every gateway runs this loop; the holder of a lease copies.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from msgspec import structs

from gateway.fleet.bases import GatewayBases
from protocol.metrics.series import HISTORY_BEHIND, HISTORY_LOST
from protocol.queue.archive import LEASE_MS, NewPast, Past
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.queue.history import MAINTAIN_MS
from protocol.runtime.backoff import Backoff
from protocol.runtime.guarded import Loop
from protocol.runtime.settings import Settings
from protocol.wire.errors import NoRoom, NotFound, ProtocolError, Unavailable

if TYPE_CHECKING:  # its packages are optional
    from gateway.requests.database import Database

PAUSE_S, SWEEP_S = 1.0, 60.0
"""Seconds between two searches for new ends, and between two deletions of rows beyond the limits."""

TENANTS_AT_ONCE, ENDS_AT_ONCE = 16, 32
"""Tenants whose histories are read at once, and maximum entries per read of each of a tenant's two streams."""

ROWS_AT_ONCE, TEXTS_AT_ONCE = 32, 8
"""Rows written at once, without and with texts."""

DELETIONS_AT_ONCE, TRIMMED_AT_ONCE = 100, 8
"""Texts deleted, and tenants trimmed, per run."""

RECENT_MS = 60_000 + MAINTAIN_MS
"""Tenants are checked for this time, in ms, after their last recorded end; after a failure, all tenants are."""

LOST = ("request", "text", "gap")


class Archiver:
    """Copies the history while its gateway holds the lease."""

    def __init__(
        self, bus: Bus, gid: str, settings: Settings, database: Database, bases: GatewayBases, sweep_s: float = SWEEP_S
    ) -> None:
        """bases: hold the facts about adapters' own texts, by which kept tokens are decoded later."""
        self._bus = bus
        self._gid = gid
        self._settings = settings
        self._database = database
        self._bases = bases
        self._sweep_s = sweep_s
        self._keep_ms = int(1000 * settings.history_s)
        self._more = asyncio.Event()  # set if there is more to copy, to skip the pause
        self._is_prepared = False
        self._looks_at_all = True
        self._unfinished: dict[str, None] = {}  # tenants with more to copy, whatever its age
        self._complete_ms = now_ms()  # when the copy was last known to be complete
        self._written: dict[str, None] = {}  # tenants with new rows since they were last trimmed
        self._too_much: dict[str, None] = {}  # tenants to trim now
        self._swept_s = time.monotonic()
        self.problem = ""
        """Why nothing can be copied, "" if there is no problem."""

    def loop(self) -> Loop:
        """Return the loop. The caller must call `leave` after it."""
        for what in LOST:
            HISTORY_LOST.labels(what)  # creates the time series at 0
        return Loop("history", self.look, PAUSE_S, self._more, Backoff(1.0, 10.0))

    async def leave(self) -> None:
        """Release the lease to another gateway, and close the database."""
        with suppress(*CONNECTION_ERRORS):
            await self._bus.archive.leave(self._gid)
        with suppress(Unavailable):
            await self._database.close()

    async def look(self) -> None:
        """Copy new ends and delete expired rows, if this gateway holds the lease. Raises Unavailable."""
        archive = self._bus.archive
        if not await archive.lead(self._gid):
            self._looks_at_all, self._is_prepared, self._complete_ms = True, False, now_ms()
            self.problem = await archive.problem()
            HISTORY_BEHIND.set(0)
            return
        begun_s = time.monotonic()
        try:
            has_more = await self._look()
        except (Unavailable, TimeoutError) as error:
            self._looks_at_all, self._is_prepared = True, False
            self.problem = str(error) or "the history's database takes too long"
            HISTORY_BEHIND.set((now_ms() - self._complete_ms) / 1000)
            await archive.tell(self.problem)
            raise
        if has_more:
            await asyncio.sleep(time.monotonic() - begun_s)  # leaves the event loop to calls half of the time
            self._more.set()
        if self.problem:
            self.problem = ""
            await archive.tell("")

    async def _look(self) -> bool:
        """Copy all recent ends once. Return whether there is more to do."""
        if not self._is_prepared:
            await self._database.prepare()
            self._is_prepared = True
        try:
            self._database.check_room()
        except NoRoom:
            await self._delete()  # what its owner has deleted goes all the same
            raise
        archive = self._bus.archive
        recent = await archive.tenants(0 if self._looks_at_all else now_ms() - RECENT_MS)
        tenants = list(dict.fromkeys([*self._unfinished, *recent]))
        behind_ms, has_more, is_idle = 0, False, True
        for begin in range(0, len(tenants), TENANTS_AT_ONCE):
            if begin and not await archive.lead(self._gid):
                return False
            since_ms = now_ms() - self._keep_ms
            some = tenants[begin : begin + TENANTS_AT_ONCE]
            found = await archive.new(some, ENDS_AT_ONCE, since_ms)
            for tenant in some:
                self._unfinished.pop(tenant, None)
            self._unfinished |= dict.fromkeys(one.tenant for one in found if one.has_more)
            oldest = min((one.found[0].place.ms for one in found if one.has_more), default=None)
            if oldest is not None:
                has_more, behind_ms = True, max(behind_ms, now_ms() - oldest)
            await self._copy(found)
            is_idle = is_idle and not found
        if is_idle:  # without writes, only this notices an unreachable database
            await self._database.check()
        self._looks_at_all = False
        self._complete_ms = now_ms() - behind_ms
        HISTORY_BEHIND.set(behind_ms / 1000)
        has_more |= await self._delete()
        return has_more | await self._sweep()

    async def _copy(self, found: list[NewPast]) -> None:
        past = [entry for one in found for entry in one.found]
        num = TEXTS_AT_ONCE if self._settings.history_text else ROWS_AT_ONCE
        for begin in range(0, len(past), num):
            # Read and write within the lease: if a text is deleted in between, the lease's holder deletes it from the
            # database afterwards.
            async with asyncio.timeout(LEASE_MS / 2000):
                if not await self._bus.archive.lead(self._gid):
                    return
                some = past[begin : begin + num]
                texts, num_lost = await self._texts(some)
                await self._database.write(list(zip(some, texts, strict=True)))
                HISTORY_LOST.labels("text").inc(num_lost)
        await self._bus.archive.copied(found, self._keep_ms)
        self._written |= dict.fromkeys(one.tenant for one in found)
        HISTORY_LOST.labels("request").inc(sum(one.entry is None for one in past))
        HISTORY_LOST.labels("gap").inc(sum(one.has_gap for one in found))

    async def _texts(self, past: list[Past]) -> tuple[list[bytes | None], int]:
        """Return the texts of ends in the database's form, and how many were lost."""
        texts: list[bytes | None] = [None] * len(past)
        if not self._settings.history_text:
            return texts, 0
        wanted = [
            (at, one.tenant, one.entry)
            for at, one in enumerate(past)
            if one.entry is not None and one.entry.state != "refused"
        ]
        found = await self._bus.archive.texts([(tenant, entry.rid) for _, tenant, entry in wanted])
        num_lost = sum(one.is_lost for one in found)
        for (at, tenant, entry), one in zip(wanted, found, strict=True):
            if one.text is None:
                continue
            try:
                digest, texts_hash = one.text.digest, ""
                if digest:
                    texts_hash = (await self._bases.default.facts(digest)).texts
            except (NotFound, ProtocolError):  # its adapter's vocabulary is no longer known
                num_lost += 1
            else:
                text = structs.replace(one.text, texts=texts_hash)
                texts[at] = self._bus.archive.sealed(tenant, entry.rid, text)
        return texts, num_lost

    async def _delete(self) -> bool:
        """Delete the texts that their owners have deleted. Return whether there are more."""
        which = await self._bus.archive.deletions(DELETIONS_AT_ONCE)
        if which:
            if not await self._database.delete_texts(which):
                return False
            await self._bus.archive.deleted(which)
        return len(which) == DELETIONS_AT_ONCE

    async def _sweep(self) -> bool:
        """Delete some of the rows that are too old or beyond a tenant's limits. Return whether there are more."""
        has_more = False
        if time.monotonic() - self._swept_s >= self._sweep_s:
            has_more = await self._database.delete_before(now_ms() - self._keep_ms)
            if not has_more:
                self._swept_s = time.monotonic()
                self._too_much, self._written = self._too_much | self._written, {}
        settings = self._settings
        for tenant in list(self._too_much)[:TRIMMED_AT_ONCE]:
            if not await self._database.trim(tenant, settings.history_requests, settings.history_text_bytes):
                del self._too_much[tenant]
        return has_more or bool(self._too_much)
