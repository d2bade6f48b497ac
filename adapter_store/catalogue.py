"""The names and contents that the fleet can ask for: the only writer of `Keys.adapters` and `Keys.adapter`."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec

from protocol import messages as m
from protocol.bus import Bus, now_ms

logger = logging.getLogger(__name__)


class Catalogue:
    """What this store has published, and Redis' copy of it."""

    def __init__(self, bus: Bus, sid: str) -> None:
        self._bus = bus
        self._sid = sid
        self.aliases: dict[str, m.Alias] = {}
        self._records: dict[str, m.AdapterRecord] = {}

    async def load(self) -> None:
        """Read what an earlier process or another store has published."""
        self.aliases = {alias.name: alias for alias in await self._bus.aliases()}

    async def publish(self, alias: m.Alias, record: m.AdapterRecord | None = None) -> None:
        """Point a name at its content, or say why it has none. In one step: a reader sees the old state or the new."""
        old = self.aliases.get(alias.name)
        created = old.created_ms if old else now_ms()
        alias = msgspec.structs.replace(alias, created_ms=created, changed_ms=now_ms())
        if record is not None:
            self._records[record.digest] = record
        if old is not None and msgspec.structs.replace(old, changed_ms=alias.changed_ms) == alias:
            return
        await self._write([alias])
        self.aliases[alias.name] = alias
        kind = "failed" if alias.state == "failed" else "alias"
        await self._bus.announce(
            m.AdapterEvent(kind=kind, name=alias.name, digest=alias.digest, source=self._sid, reason=alias.reason)
        )

    async def announce(self, aliases: Iterable[m.Alias]) -> None:
        """Publish names that are not known yet, so that requests for them wait instead of failing."""
        now = now_ms()
        new = [
            msgspec.structs.replace(alias, created_ms=now, changed_ms=now)
            for alias in aliases
            if alias.name not in self.aliases
        ]
        if new:
            await self._write(new)
            self.aliases |= {alias.name: alias for alias in new}

    async def _write(self, aliases: Iterable[m.Alias]) -> None:
        pipe = self._bus.redis.pipeline(transaction=True)
        for alias in aliases:
            record = self._records.get(alias.digest)
            if record is not None:
                pipe.set(self._bus.keys.adapter(record.digest), m.encode(record))
            pipe.hset(self._bus.keys.adapters, alias.name, m.encode(alias))
        await pipe.execute()

    async def repair(self) -> None:
        """Publish everything again if Redis came back without it."""
        if self.aliases and await self._bus.redis.hlen(self._bus.keys.adapters) < len(self.aliases):
            logger.warning("the catalogue in Redis has lost names: publishing %d again", len(self.aliases))
            await self._write(self.aliases.values())

    async def remove(self, name: str) -> None:
        """Take a name out of the catalogue. Its content stays until nothing wants it."""
        alias = self.aliases.pop(name, None)
        if alias is None:
            return
        await self._bus.redis.hdel(self._bus.keys.adapters, name)
        await self._bus.announce(m.AdapterEvent(kind="removed", name=name, digest=alias.digest, source=self._sid))

    async def record(self, digest: str) -> m.AdapterRecord | None:
        """Return the facts of a content, whoever published them."""
        return self._records.get(digest) or await self._bus.get(self._bus.keys.adapter(digest), m.AdapterRecord)
