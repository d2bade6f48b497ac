"""Adapters in the queue: names, registrations, pins, use, events, and what the stores publish."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from protocol.queue.connection.redis_client import Client, read_many
from protocol.queue.kept.readable import readable
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.errors import Conflict, NewerRecord, Overloaded
from protocol.wire.keys import Keys, private_name
from protocol.wire.records import AdapterUse

R = TypeVar("R", bound=m.Record)

USE_TTL_S = 7 * 86_400
_COUNTS = ("hits", "misses", "fetches", "fetch_ms", "loads", "load_ms")


_DELETE_IF_SAME = """
-- Delete a field of a hash if its value is still what was read.
-- KEYS[1] hash; ARGV[1] field, ARGV[2] value. Reply: int, 1 if it was deleted, else 0.
return redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] and redis.call('HDEL', KEYS[1], ARGV[1]) or 0
"""

_REPLACE_IF_SAME = """
-- Replace a field of a hash if its value is still what was read.
-- KEYS[1] hash; ARGV[1] field, ARGV[2] value, ARGV[3] new value. Reply: int, 1 if it was replaced, else 0.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""

_REGISTER = """
-- Write a registration, unless it exceeds a limit.
-- KEYS[1] registrations, KEYS[2] count of the owner's registrations in this minute. ARGV[1] field, ARGV[2] value,
-- ARGV[3] most registrations of all, ARGV[4] prefix of the owner's fields or '', ARGV[5] most of those, ARGV[6] most
-- registrations in a minute, ARGV[7] '1' if a known name counts, too. Reply: '' if it was written, else the limit:
-- 'all', 'own', 'rate'.
local is_new, prefix = redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0, ARGV[4]
if is_new and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[3]) then return 'all' end
if prefix ~= '' and is_new and string.sub(ARGV[1], 1, #prefix) == prefix then
    local own = 0
    for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
        if string.sub(field, 1, #prefix) == prefix then own = own + 1 end
    end
    if own >= tonumber(ARGV[5]) then return 'own' end
end
if prefix ~= '' and (is_new or ARGV[7] == '1') then
    local count = redis.call('INCR', KEYS[2])
    if count == 1 then redis.call('EXPIRE', KEYS[2], 120) end
    if count > tonumber(ARGV[6]) then return 'rate' end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return ''
"""

ALIASES_AT_ONCE = 256
"""Approximate number of names read from the catalogue at once: about 1 ms of work."""

MAX_REGISTERED = 10_000
"""Maximum number of registrations in a fleet."""

MAX_ON_REQUEST = 7_500
"""Number of registrations from which on requests cannot add new ones, which leaves room for tenants' registrations."""


@dataclass(frozen=True, slots=True)
class NameLimits:
    """The registration limits of a tenant with API keys."""

    tenant: str
    max_own: int  # its registered names at one time
    max_per_minute: int  # registrations of new and known names, and new names that its requests give by their source


def _readable(raw: bytes | None, kind: type[R]) -> R | None:
    """Return a record, or None if it is missing or unreadable, so that one bad record does not hide the others."""
    return next(iter(readable([raw], kind)), None)


@dataclass(frozen=True, slots=True)
class CatalogueNews:
    """Changes of the catalogue since a given event."""

    run_id: str  # run id of the server
    num_names: int
    events: list[tuple[str, bytes]]  # (stream id, encoded `messages.AdapterEvent`), oldest first


class Adapters:
    """The adapters of a fleet. A name is shared by all tenants (tenant "") or private to one tenant."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._redis = client
        self._keys = keys

    # ------------------------------------------------------------ events

    async def announce(self, *events: m.AdapterEvent) -> None:
        """Publish adapter events."""
        pipe = self._redis.pipeline(transaction=False)
        for event in events:
            pipe.xadd(self._keys.adapter_events, {"b": m.encode(event)}, maxlen=10_000, approximate=True)
        await pipe.execute()

    # ------------------------------------------------------------ catalogue

    async def records(self, digests: Iterable[str]) -> dict[str, m.AdapterRecord]:
        """Return the catalogue's records by digest, without missing and unreadable ones."""
        digests = list(digests)
        raws = await read_many(self._redis, [self._keys.adapter(digest) for digest in digests])
        found = {digest: _readable(raw, m.AdapterRecord) for digest, raw in zip(digests, raws, strict=True)}
        return {digest: record for digest, record in found.items() if record is not None}

    async def alias(self, name: str, tenant: str = "") -> m.Alias | None:
        """Return the alias of a shared name, or of a tenant's private one; None if there is none."""
        raw = await self._redis.hget(self._keys.adapters, private_name(name, tenant))
        found = _readable(raw, m.Alias)
        # A client's name may contain a NUL and so equal the field of another tenant's name.
        return found if found is not None and found.tenant == tenant else None

    async def aliases(self, tenant: str | None = "") -> list[m.Alias]:
        """Return the shared names and those of `tenant`; None: the names of all tenants."""
        raws = (await self._redis.hgetall(self._keys.adapters)).values()
        found = [alias for raw in raws if (alias := _readable(raw, m.Alias)) is not None]
        return found if tenant is None else [alias for alias in found if alias.tenant in ("", tenant)]

    async def stamp(self) -> bytes:
        """Return the catalogue's stamp, which changes with every change of the catalogue; b"" if there is none yet."""
        return await self._redis.get(self._keys.adapters_stamp) or b""

    async def some(self) -> AsyncIterator[list[m.Alias]]:
        """Yield all names of all tenants in lists of some hundreds, so that thousands do not block the event loop.

        A name that changes during the scan is yielded in its old or new state. One that is added or removed during the
        scan may be missing.
        """
        seen: set[bytes] = set()
        cursor = -1
        while cursor:
            cursor, found = await self._redis.hscan(self._keys.adapters, max(cursor, 0), count=ALIASES_AT_ONCE)
            made: list[m.Alias] = []
            for field, raw in found.items():
                if field not in seen and (alias := _readable(raw, m.Alias)) is not None:
                    seen.add(field)
                    made.append(alias)
            yield made

    async def register(
        self, registration: m.Registration, max_registered: int = MAX_REGISTERED, limits: NameLimits | None = None
    ) -> bool:
        """Have the stores serve a name from a source, or check the source again. Returns False at `max_registered`.

        limits: those of the tenant that registers. Raises Conflict or Overloaded if it exceeds them.
        """
        if registration.on_request:
            max_registered = min(max_registered, MAX_ON_REQUEST)
        tenant, registered = limits.tenant if limits is not None else "", self._keys.registrations
        count = self._keys.registered(tenant, now_ms() // 60_000) if tenant else registered  # unused without a tenant
        reply = await self._redis.eval(
            _REGISTER, 2, registered, count,
            private_name(registration.name, registration.tenant), m.encode(registration), max_registered,
            private_name("", tenant), limits.max_own if limits else 0, limits.max_per_minute if limits else 0,
            "0" if registration.on_request else "1",
        )  # fmt: skip
        if limits is not None and reply == b"own":
            text = f"tenant {limits.tenant} has {limits.max_own} registered adapters, which is the limit: unload one"
            raise Conflict(text, code="too_many_adapters")
        if limits is not None and reply == b"rate":
            raise Overloaded(f"a tenant may register {limits.max_per_minute} adapters a minute", 60.0)
        if not reply:
            await self.announce(m.AdapterEvent(kind="wanted", name=registration.name))
        return not reply

    async def ask_again(self, name: str, tenant: str, asked_ms: int) -> bool:
        """Have the stores check a registered name's source again, as requested at `asked_ms`. False if unregistered."""
        field, registered = private_name(name, tenant), self._keys.registrations
        while True:
            raw = await self._redis.hget(registered, field)
            found = _readable(raw, m.Registration)
            if found is None or found.tenant != tenant:
                return False
            if found.asked_ms < asked_ms:
                asked = m.encode(msgspec.structs.replace(found, asked_ms=asked_ms))
                if not await self._redis.eval(_REPLACE_IF_SAME, 1, registered, field, raw, asked):
                    continue  # it was changed in between
            await self.announce(m.AdapterEvent(kind="wanted", name=name))
            return True

    async def registration(self, name: str, tenant: str = "") -> m.Registration | None:
        """Return the registration of a name; None if there is none."""
        raw = await self._redis.hget(self._keys.registrations, private_name(name, tenant))
        found = _readable(raw, m.Registration)
        return found if found is not None and found.tenant == tenant else None

    async def unregister(self, name: str, tenant: str = "", *, unless_asked_after: int | None = None) -> bool:
        """Withdraw a registration; the stores then remove the name.

        Returns False if there was none, or if it was requested after `unless_asked_after` (unix ms).
        """
        field, registered = private_name(name, tenant), self._keys.registrations
        raw = await self._redis.hget(registered, field)
        found = _readable(raw, m.Registration)
        if found is None or found.tenant != tenant:
            return False
        if unless_asked_after is not None and found.asked_ms > unless_asked_after:
            return False
        if not await self._redis.eval(_DELETE_IF_SAME, 1, registered, field, raw):
            return False
        await self.announce(m.AdapterEvent(kind="wanted", name=name))
        return True

    async def registrations(self) -> dict[str, m.Registration]:
        """Return all registrations by field, as `private_name` spells it."""
        raws = await self._redis.hgetall(self._keys.registrations)
        found = {name.decode(): _readable(raw, m.Registration) for name, raw in raws.items()}
        return {name: registration for name, registration in found.items() if registration is not None}

    async def is_newer(self, field: str) -> bool:
        """Return whether a name has a registration in a form that only newer releases can read."""
        raw = await self._redis.hget(self._keys.registrations, field)
        try:
            readable([raw], m.Registration, leave_newer=True)
        except NewerRecord:
            return True
        return False

    # ------------------------------------------------------------ pins and use

    async def pins(self) -> dict[str, str]:
        """Return the pinned names, and the origin of each pin: "settings" or "api"."""
        return {name.decode(): by.decode() for name, by in (await self._redis.hgetall(self._keys.pins)).items()}

    async def pin(self, name: str, by: str) -> None:
        """Pin a name, so that workers keep its adapter resident. A pin from the settings keeps that origin."""
        await self._redis.hsetnx(self._keys.pins, name, by)
        await self.announce(m.AdapterEvent(kind="wanted", name=name))

    async def unpin(self, name: str) -> bool:
        """Remove a pin. Returns False if there was none."""
        known = bool(await self._redis.hdel(self._keys.pins, name))
        await self.announce(m.AdapterEvent(kind="wanted", name=name))
        return known

    async def note_use(self, uses: Mapping[str, AdapterUse]) -> None:
        """Add to the fleet's usage counts by digest. A repetition after a lost reply counts twice."""
        pipe = self._redis.pipeline(transaction=False)
        for digest, use in uses.items():
            key = self._keys.adapter_use(digest)
            for name in _COUNTS:
                if added := getattr(use, name):
                    pipe.hincrby(key, name, added)
            if use.last_ms:
                pipe.hset(key, "last_ms", use.last_ms)
            pipe.expire(key, USE_TTL_S)
        await pipe.execute()

    async def uses(self, digests: Iterable[str]) -> dict[str, AdapterUse]:
        """Return the usage counts by digest; adapters not used for a week are missing."""
        digests = list(digests)
        pipe = self._redis.pipeline(transaction=False)
        for digest in digests:
            pipe.hgetall(self._keys.adapter_use(digest))
        found = zip(digests, await pipe.execute(), strict=True)
        return {
            digest: AdapterUse(**{name.decode(): int(value) for name, value in fields.items()})
            for digest, fields in found
            if fields
        }

    # ------------------------------------------------------------ for the stores

    async def news(self, after: str) -> CatalogueNews:
        """Return the events since `after`; "": since the oldest stored event."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.info("server")
        pipe.hlen(self._keys.adapters)
        pipe.xrange(self._keys.adapter_events, min=f"({after}" if after else "-")
        server, num_names, entries = await pipe.execute()
        return CatalogueNews(
            server["run_id"], num_names, [(entry.decode(), fields.get(b"b", b"")) for entry, fields in entries]
        )

    async def publish(self, published: Iterable[tuple[m.Alias, m.AdapterRecord | None]]) -> None:
        """Write names and the records that they refer to, atomically."""
        pipe = self._redis.pipeline(transaction=True)
        for alias, record in published:
            if record is not None:
                pipe.set(self._keys.adapter(record.digest), m.encode(record))
            pipe.hset(self._keys.adapters, private_name(alias.name, alias.tenant), m.encode(alias))
        self._stamp(pipe)
        await pipe.execute()

    async def withdraw(self, field: str) -> None:
        """Delete a name. field: as `private_name` spells it."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.hdel(self._keys.adapters, field)
        self._stamp(pipe)
        await pipe.execute()

    def _stamp(self, pipe: Pipeline) -> None:
        """Invalidate copies of the catalogue with a random stamp: a counter could repeat after a loss of data."""
        pipe.set(self._keys.adapters_stamp, uuid.uuid4().bytes)

    async def known_digests(self) -> list[str]:
        """Return the digests that have a record. Scans all keys."""
        prefix = self._keys.adapter("")
        return [
            key.decode().removeprefix(prefix)
            async for key in self._redis.scan_iter(match=self._keys.adapter("*"), count=1000)
        ]

    async def delete_records(self, digests: Iterable[str]) -> list[str] | None:
        """Delete the records of those digests to which no name refers, and return these digests.

        Returns None, with nothing deleted, if names were published in between. Raises NewerRecord if some name can be
        read only by newer releases.
        """
        async with self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(self._keys.adapters)
            named = {
                alias.digest for alias in readable(await pipe.hvals(self._keys.adapters), m.Alias, leave_newer=True)
            }
            gone = [digest for digest in digests if digest not in named]
            pipe.multi()
            for digest in gone:
                pipe.delete(self._keys.adapter(digest))
            try:
                await pipe.execute()
            except WatchError:
                return None
        return gone

    async def take_lease(self, field: str, ttl_ms: int) -> bool:
        """Take the lease to fetch a name, for `ttl_ms`. Returns False if another store holds it."""
        return bool(await self._redis.set(self._keys.fetching(field), "1", nx=True, px=ttl_ms))

    async def renew_leases(self, fields: Iterable[str], ttl_ms: int) -> None:
        """Extend the leases on these names to `ttl_ms` from now."""
        pipe = self._redis.pipeline(transaction=False)
        for field in fields:
            pipe.pexpire(self._keys.fetching(field), ttl_ms)
        await pipe.execute()

    async def release_lease(self, field: str) -> None:
        """Release the lease on a name, so that another store may fetch it."""
        await self._redis.delete(self._keys.fetching(field))
