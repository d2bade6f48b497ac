"""Buffers this gateway's refused calls, and writes them into their tenants' histories."""

from __future__ import annotations

import orjson

from gateway.http.errors import Outcome
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m
from protocol.wire.error_codec import error_json
from protocol.wire.errors import LorafleetError

FLUSH_S = 1.0
"""Seconds between writes."""

MAX_OF_TENANT, MAX_WAITING = 20, 1000
"""Maximum buffered refused calls of one tenant, and of all; further ones count only in metrics. This bounds the queue's
load from a client that is refused thousands of times a second."""

MAX_TEXT = 300
"""Maximum characters of an error message, model or path in an entry."""


class Refusals:
    """The refused calls not written yet."""

    def __init__(self, bus: Bus, keep_s: float) -> None:
        """Start empty. keep_s: how long entries are kept, in seconds."""
        self._bus = bus
        self._keep_ms = int(1000 * keep_s)
        self._waiting: dict[str, list[m.HistoryEntry]] = {}
        self._num = 0

    def note(self, tenant: str, request_id: str, path: str, status: int, outcome: Outcome) -> None:
        """Buffer a refused call, unless the buffer is full. path: of its route; status: HTTP status of its answer."""
        entries = self._waiting.setdefault(tenant, [])
        if outcome.error is None or len(entries) >= MAX_OF_TENANT or self._num >= MAX_WAITING:
            return
        self._num += 1
        error = outcome.error
        short = LorafleetError(error.message[:MAX_TEXT], code=error.code)
        row = orjson.dumps([outcome.model[:MAX_TEXT], "", "", 0]).decode()
        entries.append(
            m.HistoryEntry(
                request_id, request_id, row, "", "refused", "error", error_json(short), "", 0, 0, 0, 0,
                outcome.began_ms, 0, now_ms(), path[:MAX_TEXT], error.status if status < 400 else status,
            )
        )  # fmt: skip

    async def flush(self) -> None:
        """Write the buffered calls. On a failure of the queue they are lost."""
        waiting, self._waiting, self._num = self._waiting, {}, 0
        found = [(tenant, entry) for tenant, entries in waiting.items() for entry in entries]
        if found:
            await self._bus.history.add_refusals(found, self._keep_ms)
