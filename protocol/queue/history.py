"""The history of requests: ended requests and refused calls by tenant, the latest first.

Each tenant has two streams, bounded in time and number, so that refused calls do not displace ended requests. A tenant
shortens another's stream only if the limits of all tenants exceed the total: then all have equal shares.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from protocol.queue.connection.redis_client import Client
from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.errors import ProtocolError
from protocol.wire.keys import Keys

MAX_TENANTS = 200
"""Maximum number of tenants whose histories are read together, those with the latest ends."""

MAX_REFUSALS = 1000
"""Maximum number of refused calls kept per tenant."""

MAX_ALL_REFUSALS = 50_000
"""Maximum number of refused calls kept for all tenants, in equal shares."""

MAINTAIN_MS = 10_000
"""Milliseconds after which scripts renew a history's TTL again, see `note_history` in `lua/common.lua`."""

_FIRST, _MOST = 200, 100
"""Entries per read: the first number for all streams together at first, the second as the maximum for one stream. Each
further read of a stream doubles its number, so that at most a small multiple of the used entries is read.
"""


def kept_for(seconds: float, num: int) -> str:
    """Return the retention of a tenant's history, in seconds and entries, in the form that `Bus.submit` takes."""
    return f"{int(1000 * seconds)} {num}"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """The place of an entry in the order of a history: by time, within one millisecond by sequence and stream."""

    ms: int
    seq: int
    mark: str  # hash of the stream's key, without the tenant's name


@dataclass(slots=True)
class _Reader:
    """A stream of a tenant, read from its newest entry to older ones."""

    tenant: str
    key: str
    mark: str
    after: str  # bound of the next read, exclusive
    num: int  # entries of the next read
    entries: list[tuple[bytes, dict[bytes, bytes]]] = field(default_factory=list[tuple[bytes, dict[bytes, bytes]]])
    is_done: bool = False


_REFUSALS_AT_ONCE = 8
"""Refused calls written per pipeline, so that other tasks can run: 0.3 ms for the client, and as much for the replies.
"""


class History:
    """The histories of a fleet's tenants."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._redis = client
        self._keys = keys

    async def add_refusals(self, found: Sequence[tuple[str, m.HistoryEntry]], keep_ms: int) -> None:
        """Add refused calls, each with its tenant. keep_ms: their retention."""
        num = max(await self._redis.zcard(self._keys.histories), 1)
        share = max(1, min(MAX_REFUSALS, MAX_ALL_REFUSALS // num))
        place = random.randrange(num)  # a random tenant, trimmed to its share although it adds nothing
        others = await self._redis.zrange(self._keys.histories, place, place)
        pipe = self._redis.pipeline(transaction=False)
        for other in others:
            pipe.xtrim(self._keys.refusals(other.decode()), maxlen=share)
        for some in (found[at : at + _REFUSALS_AT_ONCE] for at in range(0, len(found), _REFUSALS_AT_ONCE)):
            latest: dict[str, int] = {}
            for tenant, entry in some:
                pipe.xadd(self._keys.refusals(tenant), {"b": m.encode(entry)}, maxlen=share)
                latest[tenant] = max(latest.get(tenant, 0), entry.ended_ms)
            for tenant, ended_ms in latest.items():
                key = self._keys.refusals(tenant)
                pipe.xtrim(key, minid=ended_ms - keep_ms)
                pipe.pexpire(key, keep_ms)
            ends = {tenant: ended_ms - 2 * MAINTAIN_MS for tenant, ended_ms in latest.items()}  # the next end trims it
            pipe.zadd(self._keys.histories, ends, gt=True)
            pipe.pexpire(self._keys.histories, keep_ms)
            await pipe.execute()

    async def tenants(self) -> list[str]:
        """Return the tenants with a history, the one with the latest end first, at most MAX_TENANTS."""
        return [name.decode() for name in await self._redis.zrevrange(self._keys.histories, 0, MAX_TENANTS - 1)]

    async def walk(
        self, tenants: Sequence[str], since_ms: int, until_ms: int, after: Place | None
    ) -> AsyncIterator[tuple[Place, str, m.HistoryEntry | None]]:
        """Yield (place, tenant, entry) of all entries of tenants in a period, the latest first.

        since_ms, until_ms: unix ms, the end exclusive; 0: now. after: the place at which the last page ended; None:
        begin. An entry is None if another release wrote it and this one cannot read it.
        """
        top = f"({until_ms}" if until_ms else "+"
        if after is not None:
            top = f"({after.ms}-{after.seq + 1}"  # others with the same id may follow
        num = max(2, _FIRST // max(2 * len(tenants), 1))
        readers = [
            _Reader(tenant, key, mark_of(key), top, num)
            for tenant in tenants
            for key in (self._keys.history(tenant), self._keys.refusals(tenant))
        ]
        low = str(max(since_ms, 0))
        await self._fill(readers, low)
        heap: list[tuple[int, int, str, int]] = []
        for number, reader in enumerate(readers):
            self._push(heap, number, reader)
        while heap:
            ms, seq, mark, number = heapq.heappop(heap)
            reader = readers[number]
            _, fields = reader.entries.pop(0)
            place = Place(-ms, -seq, mark)
            if after is None or (place.ms, place.seq) != (after.ms, after.seq) or mark > after.mark:
                yield place, reader.tenant, entry_of(fields)
            if not reader.entries and not reader.is_done:
                await self._fill([reader], low)
            self._push(heap, number, reader)

    @staticmethod
    def _push(heap: list[tuple[int, int, str, int]], number: int, reader: _Reader) -> None:
        if reader.entries:
            ms, _, seq = reader.entries[0][0].decode().partition("-")
            heapq.heappush(heap, (-int(ms), -int(seq), reader.mark, number))

    async def _fill(self, readers: Sequence[_Reader], low: str) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for reader in readers:
            pipe.xrevrange(reader.key, reader.after, low, count=reader.num)
        for reader, entries in zip(readers, await pipe.execute() if readers else [], strict=True):
            reader.entries = entries
            reader.is_done = len(entries) < reader.num
            reader.num = max(reader.num, min(2 * reader.num, _MOST))
            if entries:
                reader.after = f"({entries[-1][0].decode()}"


def mark_of(key: str) -> str:
    """Return the short hash that stands for a stream in a `Place`."""
    return hashlib.blake2b(key.encode(), digest_size=6).hexdigest()


def entry_of(fields: dict[bytes, bytes]) -> m.HistoryEntry | None:
    """Return a decoded stream entry; None if another release wrote it and this one cannot read it."""
    try:
        return decode(fields.get(b"b", b""), m.HistoryEntry)
    except ProtocolError:
        return None
