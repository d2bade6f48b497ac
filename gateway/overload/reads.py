"""How much a tenant may read, as calls have their limits: each read costs something, a list more, by its length.

Nothing that is only read goes into the queue, so none of the limits of calls holds it: without one of their own,
clients that list and list would take the loop from everybody's streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.auth.callers import CALLER, Caller
from gateway.http.access import MATCH, Match
from gateway.http.addresses import origin_of
from gateway.http.errors import ShapeOf
from gateway.http.paths import LISTS, PROBES
from protocol.wire.errors import Overloaded

LIST_COST = 10
"""What a list costs beside its bytes, in reads: it is put together of many looks into the queue."""

BYTES_PER_READ = 4096
"""Bytes of a list that cost as much as a read more, which is known once they are sent."""

LISTS_AT_ONCE = 8
"""Most lists that are made for one tenant, or one address, at a time."""

BURST_S = 5.0
"""Seconds' worth of reads that may come at once."""

MAX_DEBT_S = 30.0
"""Longest time in which what long lists have cost is waited for."""

MAX_READERS = 10_000
"""Readers that are remembered; the longest silent are forgotten, whose reads are all there again by then."""


@dataclass(slots=True)
class _Reader:
    """What a tenant or an address may still read."""

    left: float
    at_s: float  # when that was
    num_lists: int = 0  # that are being made


class Reads:
    """Lets reads in as far as their senders have any left, and answers the others with 429."""

    def __init__(
        self, app: ASGIApp, shape_of: ShapeOf, per_s: float, now_s: Callable[[], float] | None = None
    ) -> None:  # fmt: skip
        """`shape_of`: how errors of a request are written. `per_s`: reads a second, 0 for no limit."""
        self._app = app
        self._shape_of = shape_of
        self._per_s = per_s
        self._now_s = now_s or (lambda: asyncio.get_running_loop().time())
        self._readers: dict[str, _Reader] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 429."""
        path = _path_of(scope) if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") else ""
        name = _name_of(scope) if path and path not in PROBES and self._per_s else ""
        if not name:
            await self._app(scope, receive, send)
            return
        is_list = path in LISTS
        reader = self._reader(name)
        try:
            self._take(name, reader, LIST_COST if is_list else 1, is_list=is_list)
        except Overloaded as error:
            await self._shape_of(scope).response(error)(scope, receive, send)
            return
        if not is_list:
            await self._app(scope, receive, send)
            return
        lowest = -MAX_DEBT_S * self._per_s

        async def send_counted(message: Message) -> None:
            reader.left = max(reader.left - len(message.get("body", b"")) / BYTES_PER_READ, lowest)
            await send(message)

        reader.num_lists += 1
        try:
            await self._app(scope, receive, send_counted)
        finally:
            reader.num_lists -= 1

    def _reader(self, name: str) -> _Reader:
        """Return a reader with what it has left now. The others stay in the order in which they have read."""
        now_s = self._now_s()
        reader = self._readers.pop(name, None) or _Reader(BURST_S * self._per_s, now_s)
        reader.left = min(reader.left + (now_s - reader.at_s) * self._per_s, BURST_S * self._per_s)
        reader.at_s = now_s
        self._readers[name] = reader
        if len(self._readers) > MAX_READERS:
            del self._readers[next(iter(self._readers))]
        return reader

    def _take(self, name: str, reader: _Reader, cost: int, *, is_list: bool) -> None:
        """Let a reader read once more. Raises Overloaded."""
        if is_list and reader.num_lists >= LISTS_AT_ONCE:
            raise Overloaded(f"{reader.num_lists} lists are being made for {name}, as many as may be", 1.0, "reads")
        if reader.left < cost:
            wait_s = (cost - reader.left) / self._per_s
            limits = f"{self._per_s:g} reads a second, of which a list costs {LIST_COST}, and one for each 4 kB of it"
            text = f"{name} may make {limits}: it has none left for {wait_s:.1f} s"
            raise Overloaded(text, max(wait_s, 1.0), "reads")
        reader.left -= cost


def _path_of(scope: Scope) -> str:
    """Return the path of a request's route, however the request spells it; its own where it has no route."""
    match: Match = scope[MATCH]
    return match.route.path if match.route is not None else match.path


def _name_of(scope: Scope) -> str:
    """Return who reads: a tenant, or where there are no keys, an address; "" for this machine's own."""
    caller: Caller = scope[CALLER]
    if caller.name:
        return f"tenant {caller.name}"
    client = scope.get("client")
    origin = origin_of(tuple(client)) if client else ""
    return f"address {origin}" if origin else ""
