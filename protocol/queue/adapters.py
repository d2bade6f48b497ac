"""The part of the queue's client that is about adapters: names, registrations, pins, use, events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.keys import Keys, private_name
from protocol.wire.records import AdapterUse

USE_TTL_S = 7 * 86_400
_COUNTS = ("hits", "misses", "fetches", "fetch_ms", "loads", "load_ms")


class AdapterBus:
    """A base of `Bus`, which sets `redis` and `keys`."""

    redis: Any
    keys: Keys

    # ------------------------------------------------------------ events

    async def announce(self, *events: m.AdapterEvent) -> None:
        """Publish adapter events."""
        pipe = self.redis.pipeline(transaction=False)
        for event in events:
            pipe.xadd(self.keys.adapter_events, {"b": m.encode(event)}, maxlen=10_000, approximate=True)
        await pipe.execute()

    # ------------------------------------------------------------ catalogue

    async def adapter_records(self, digests: Sequence[str]) -> list[m.AdapterRecord]:
        """Return what the catalogue knows of adapter contents."""
        raws = await self.redis.mget([self.keys.adapter(digest) for digest in digests])
        return [decode(raw, m.AdapterRecord) for raw in raws if raw is not None]

    async def alias(self, name: str, tenant: str = "") -> m.Alias | None:
        """Return what an adapter name stands for now: everybody's, or a tenant's private one."""
        raw = await self.redis.hget(self.keys.adapters, private_name(name, tenant))
        found = decode(raw, m.Alias) if raw is not None else None
        # A name from outside may hold a NUL, and so be the field of another tenant's.
        return found if found is not None and found.tenant == tenant else None

    async def aliases(self, tenant: str | None = "") -> list[m.Alias]:
        """Return everybody's names and those of `tenant`; None: all there are."""
        found = [decode(raw, m.Alias) for raw in (await self.redis.hgetall(self.keys.adapters)).values()]
        return found if tenant is None else [alias for alias in found if alias.tenant in ("", tenant)]

    async def register(self, registration: m.Registration, max_registered: int = 10_000) -> bool:
        """Have the stores serve a name from a remote source; asking again renews a refusal's chance. False if full."""
        name, registered = private_name(registration.name, registration.tenant), self.keys.registrations
        if await self.redis.hlen(registered) >= max_registered and not await self.redis.hexists(registered, name):
            return False
        await self.redis.hset(self.keys.registrations, name, m.encode(registration))
        await self.announce(m.AdapterEvent(kind="wanted", name=registration.name))
        return True

    async def registration(self, name: str, tenant: str = "") -> m.Registration | None:
        """Return what a name is registered for."""
        raw = await self.redis.hget(self.keys.registrations, private_name(name, tenant))
        found = decode(raw, m.Registration) if raw is not None else None
        return found if found is not None and found.tenant == tenant else None

    async def unregister(self, name: str, tenant: str = "", *, unless_asked_after: int | None = None) -> bool:
        """Take a registration back; the stores then remove the name. False if there was none, or a newer one."""
        field, registered = private_name(name, tenant), self.keys.registrations
        raw = await self.redis.hget(registered, field)
        found = decode(raw, m.Registration) if raw is not None else None
        if found is None or found.tenant != tenant:
            return False
        if unless_asked_after is not None and found.asked_ms > unless_asked_after:
            return False
        script = "return redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] and redis.call('HDEL', KEYS[1], ARGV[1]) or 0"
        if not await self.redis.eval(script, 1, registered, field, raw):
            return False
        await self.announce(m.AdapterEvent(kind="wanted", name=name))
        return True

    async def registrations(self) -> dict[str, m.Registration]:
        """Return all registrations by the name that the catalogue has for them."""
        raws = await self.redis.hgetall(self.keys.registrations)
        return {name.decode(): decode(raw, m.Registration) for name, raw in raws.items()}

    # ------------------------------------------------------------ pins and use

    async def pins(self) -> dict[str, str]:
        """Return the names that are to stay in workers' pools, and who wants it: "settings" or "api"."""
        return {name.decode(): by.decode() for name, by in (await self.redis.hgetall(self.keys.pins)).items()}

    async def pin(self, name: str, by: str) -> None:
        """Have workers keep what a name stands for in their pools; what the settings say stays theirs."""
        await self.redis.hsetnx(self.keys.pins, name, by)
        await self.announce(m.AdapterEvent(kind="wanted", name=name))

    async def unpin(self, name: str) -> bool:
        """Take a pin back. False if there was none."""
        known = bool(await self.redis.hdel(self.keys.pins, name))
        await self.announce(m.AdapterEvent(kind="wanted", name=name))
        return known

    async def note_use(self, uses: Mapping[str, AdapterUse]) -> None:
        """Add to what the fleet knows of the use of adapters. A lost reply counts it twice."""
        pipe = self.redis.pipeline(transaction=False)
        for digest, use in uses.items():
            key = self.keys.adapter_use(digest)
            for name in _COUNTS:
                if added := getattr(use, name):
                    pipe.hincrby(key, name, added)
            if use.last_ms:
                pipe.hset(key, "last_ms", use.last_ms)
            pipe.expire(key, USE_TTL_S)
        await pipe.execute()

    async def uses(self, digests: Iterable[str]) -> dict[str, AdapterUse]:
        """Return the use of adapters; of those used in the last week only."""
        digests = list(digests)
        pipe = self.redis.pipeline(transaction=False)
        for digest in digests:
            pipe.hgetall(self.keys.adapter_use(digest))
        found = zip(digests, await pipe.execute(), strict=True)
        return {
            digest: AdapterUse(**{name.decode(): int(value) for name, value in fields.items()})
            for digest, fields in found
            if fields
        }
