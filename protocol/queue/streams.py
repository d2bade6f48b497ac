"""Streams: reading, creating and renewing them, and setting unreadable entries aside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from protocol.queue.connection.line import Line
from protocol.queue.connection.redis_client import Client
from protocol.queue.dead_letters import set_aside
from protocol.queue.scripts import Scripts
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.keys import Keys

Entry: TypeAlias = tuple[bytes, dict[bytes, bytes]]
"""A stream entry: its id and its fields. The message is in the field `b"b"`."""

LATE_S = 2.0
"""Seconds beyond a blocking read's timeout after which a silent server counts as lost."""

ORDERS_KEPT_MS = 300_000

_DELETE_IF_LENGTH = """
-- Delete a stream if it holds exactly as many entries as believed.
-- KEYS[1] stream; ARGV[1] int, number of entries. Reply: int, 1 if it was deleted, else 0.
if redis.call('XLEN', KEYS[1]) ~= tonumber(ARGV[1]) then return 0 end
redis.call('DEL', KEYS[1])
return 1
"""


class Streams:
    """The streams of a fleet."""

    def __init__(self, client: Client, blocking: Client, keys: Keys, scripts: Scripts) -> None:
        """blocking: a client without a read timeout, for blocking reads."""
        self._redis = client
        self._blocking = blocking
        self._keys = keys
        self._scripts = scripts
        self._lines: set[Line] = set()  # connections for reads; a blocking read delays all commands behind it
        self._free: list[Line] = []  # connections without a pending read
        self._is_closed = False

    async def close(self) -> None:
        """Close the connections used for reads. Later reads raise a connection error."""
        self._is_closed = True
        for line in list(self._lines):
            await line.close()

    # ------------------------------------------------------------ reading

    async def read(self, last_ids: dict[str, bytes], *, block_ms: int, count: int = 256) -> dict[str, list[Entry]]:
        """Wait for entries after `last_ids` (stream -> id) on any of these streams, and advance it. {}: timeout.

        Raises a connection error if the server does not answer within LATE_S after the timeout: it may be partitioned,
        and a failover may have made another server the primary.
        """
        if self._is_closed:  # a new connection would have no owner left to close it
            raise RedisConnectionError("the connection to the queue was closed")
        line = self._free.pop() if self._free else Line(self._blocking, None)
        self._lines.add(line)
        try:
            reply = await line.ask(
                ("XREAD", "COUNT", count, "BLOCK", block_ms, "STREAMS", *last_ids, *last_ids.values()),
                within_s=block_ms / 1000 + LATE_S,
            )
        except BaseException as error:  # the server may still send a reply on this connection
            self._lines.remove(line)
            await line.close()
            if isinstance(error, TimeoutError):
                raise RedisTimeoutError("timeout reading from the queue") from None
            raise
        self._free.append(line)
        found: dict[str, list[Entry]] = {}
        for name, entries in _pairs(reply):
            found[name.decode()] = [(id_, dict(zip(fields[::2], fields[1::2], strict=True))) for id_, fields in entries]
            last_ids[name.decode()] = entries[-1][0]
        return found

    async def entries(self, stream: str) -> list[Entry]:
        """Return all entries of a stream, oldest first."""
        return list(await self._redis.xrange(stream))

    async def length(self, stream: str) -> int:
        """Return the number of entries of a stream."""
        return int(await self._redis.xlen(stream))

    async def last_id(self, stream: str) -> bytes:
        """Return the id of a stream's newest entry, from which a reader can continue; b"0" for an empty stream."""
        newest = await self._redis.xrevrange(stream, count=1)
        return newest[0][0] if newest else b"0"

    # ------------------------------------------------------------ writing

    async def reject(self, stream: str, entry: Entry, reason: str) -> None:
        """Move an unusable entry to the dead letters, within their limits."""
        raw, taken = entry[1].get(b"b", b""), ("XDEL", stream, entry[0])
        await set_aside(self._scripts, self._keys, stream, raw, reason, taken)

    async def tell(self, orders: Sequence[tuple[str, m.Control]]) -> None:
        """Send orders to workers, by wid. An order to a worker that is gone is lost."""
        add = ("NOMKSTREAM", "MINID", "~", now_ms() - ORDERS_KEPT_MS, "*", "b")
        written = [("XADD", self._keys.ctl(wid), *add, m.encode(order)) for wid, order in orders]
        await self._scripts.write_vital(*written)

    async def create(self, stream: str, ttl_s: int) -> None:
        """Create an empty stream with a TTL, so that writers that use NOMKSTREAM can add to it."""
        await self._scripts.write_vital(
            ("XADD", stream, "*", "b", b""),
            ("XTRIM", stream, "MAXLEN", 0),
            ("EXPIRE", stream, ttl_s),
        )

    async def keep(self, stream: str, *, ttl_s: int, max_age_ms: int) -> bool:
        """Renew a stream's TTL and drop its entries older than `max_age_ms`. Returns False if the stream is gone."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.expire(stream, ttl_s)
        pipe.xtrim(stream, minid=now_ms() - max_age_ms, approximate=True)
        return bool((await pipe.execute())[0])

    async def delete(self, stream: str, num_entries: int) -> bool:
        """Delete a stream if it has exactly `num_entries` entries. Returns whether it was deleted."""
        return bool(await self._redis.eval(_DELETE_IF_LENGTH, 1, stream, num_entries))


def _pairs(reply: Any) -> Iterable[tuple[bytes, list[tuple[bytes, list[bytes]]]]]:
    """Return the streams and entries of an XREAD reply: a map in RESP3, a list in RESP2, nil without entries."""
    return cast("dict[bytes, Any]", reply).items() if isinstance(reply, dict) else reply or ()
