"""The history of requests: what has ended, and what was refused, by tenant, the latest first.

Each tenant has two streams, bounded in time and number, so that refused calls do not shorten that of served ones. A
tenant shortens another's only where there are so many that each has less than its number:
then all have equal shares.
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
"""Tenants whose histories are read together: those with the latest ends."""

MAX_REFUSALS = 1000
"""Refused calls that are kept of a tenant."""

MAX_ALL_REFUSALS = 50_000
"""Refused calls that are kept of all tenants, in equal shares."""

MAINTAIN_MS = 10_000
"""Pause between prolongations of a history's life by the scripts, see `note_history` in `lua/common.lua`."""

_FIRST, _MOST = 200, 100
"""Entries that are read at once: at first of all streams together, then of one at most. Each read of a stream has twice
as many as the one before, so that no more is read than a small multiple of what is looked at."""


def kept_for(seconds: float, num: int) -> str:
    """Return how long, and how many, ends stay in a tenant's history, as `Bus.submit` takes it."""
    return f"{int(1000 * seconds)} {num}"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """The place of an entry in the order of a history: by time, of one millisecond by stream."""

    ms: int
    seq: int
    mark: str  # of the stream, without the tenant's name


@dataclass(slots=True)
class _Reader:
    """A stream of a tenant, read backwards."""

    tenant: str
    key: str
    mark: str
    after: str  # where the next read begins, exclusive
    num: int  # entries of the next read
    entries: list[tuple[bytes, dict[bytes, bytes]]] = field(default_factory=list[tuple[bytes, dict[bytes, bytes]]])
    is_done: bool = False


_REFUSALS_AT_ONCE = 8
"""Refused calls that are written before others have their turn: 0.3 ms in the client, and as much for the replies."""


class History:
    """The histories of a fleet's tenants."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._redis = client
        self._keys = keys

    async def add_refusals(self, found: Sequence[tuple[str, m.HistoryEntry]], keep_ms: int) -> None:
        """Add refused calls, each with its tenant. keep_ms: how long they are kept."""
        num = max(await self._redis.zcard(self._keys.histories), 1)
        share = max(1, min(MAX_REFUSALS, MAX_ALL_REFUSALS // num))
        place = random.randrange(num)  # a tenant that may have had a larger share before it fell silent
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
            ends = {tenant: ended_ms - 2 * MAINTAIN_MS for tenant, ended_ms in latest.items()}  # the next end looks
            pipe.zadd(self._keys.histories, ends, gt=True)
            pipe.pexpire(self._keys.histories, keep_ms)
            await pipe.execute()

    async def tenants(self) -> list[str]:
        """Return the tenants with a history, the one with the latest end first, MAX_TENANTS at most."""
        return [name.decode() for name in await self._redis.zrevrange(self._keys.histories, 0, MAX_TENANTS - 1)]

    async def walk(
        self, tenants: Sequence[str], since_ms: int, until_ms: int, after: Place | None
    ) -> AsyncIterator[tuple[Place, str, m.HistoryEntry | None]]:
        """Yield the place, tenant and entry of all ends of tenants in a time, the latest first.

        after: where the last page ended, None to begin. until_ms: exclusive; 0: now. None stands for an entry that
        another release wrote and this one cannot read.
        """
        top = f"({until_ms}" if until_ms else "+"
        if after is not None:
            top = f"({after.ms}-{after.seq + 1}"  # others of the same place come after it
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
    """Return what stands for a stream in a `Place`."""
    return hashlib.blake2b(key.encode(), digest_size=6).hexdigest()


def entry_of(fields: dict[bytes, bytes]) -> m.HistoryEntry | None:
    """Return what an entry of a stream says, None where another release wrote it and this one cannot read it."""
    try:
        return decode(fields.get(b"b", b""), m.HistoryEntry)
    except ProtocolError:
        return None
