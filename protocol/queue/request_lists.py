"""The waiting requests of a fleet, and the summary of a request for lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protocol.queue.books.usage import owner_of, row_of
from protocol.queue.connection.redis_client import Client
from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.errors import ProtocolError
from protocol.wire.keys import Keys
from protocol.wire.records import RequestSummary

_FIELDS = (
    "state", "tenant", "cls", "digest", "call", "owner", "finish", "n_prompt", "attempts", "t_submit", "t_first",
    "t_end", "cached", "error", "usage",
)  # fmt: skip


class RequestLists:
    """Reads the queues of waiting requests, and requests' records for lists."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._redis = client
        self._keys = keys

    async def queued(self, cls: str, after: str, limit: int) -> list[tuple[str, m.RequestHead | None]]:
        """Return the waiting requests of a class with their entry ids, oldest first, after entry `after`; "": all.

        A request is None if its entry cannot be decoded; the scheduler sets such an entry aside.
        """
        low = f"({after}" if after else "-"
        entries = await self._redis.xrange(self._keys.sub(cls), low, "+", count=limit)
        found: list[tuple[str, m.RequestHead | None]] = []
        for entry, fields in entries:
            try:
                found.append((entry.decode(), decode(fields.get(b"b", b""), m.RequestHead)))
            except ProtocolError:
                found.append((entry.decode(), None))
        return found

    async def summaries(self, rids: Sequence[str]) -> list[RequestSummary | None]:
        """Return the summaries of requests, None for each that has expired or never existed."""
        pipe = self._redis.pipeline(transaction=False)
        for rid in rids:
            pipe.hmget(self._keys.req(rid), _FIELDS)
            pipe.strlen(self._keys.tok(rid))
        replies: list[Any] = await pipe.execute() if rids else []
        found: list[RequestSummary | None] = []
        for rid, row, length in zip(rids, replies[::2], replies[1::2], strict=True):
            if row[0] is None:
                found.append(None)
                continue
            words: list[str] = [(value or b"").decode() for value in row[:-1]]
            state, tenant, cls, digest, call, owner, finish = words[:7]
            num_prompt, attempts, submitted, first, ended, cached = (int(word or 0) for word in words[7:13])
            usage = row[-1] or b""
            entry = m.HistoryEntry(
                rid, call, row_of(usage), cls, state, finish, words[13], owner, num_prompt, cached, length // 4,
                attempts, submitted, first, ended,
            )  # fmt: skip
            found.append(RequestSummary(entry, owner_of(usage) or tenant, digest))
        return found
