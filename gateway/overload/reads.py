"""Rate limit of a tenant's requests other than calls: each read has a cost, a list a higher one.

Such requests are not queued, so no limit of calls applies: unlimited lists would take the event loop from other
clients' streams. The cost is the work, not the result: a page that shows nothing costs what was examined for it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.auth.callers import CALLER, Caller
from gateway.http.access import MATCH, RouteMatch
from gateway.http.addresses import client_of
from gateway.http.errors import ShapeOf
from gateway.http.headers import header_of
from gateway.http.paths import LISTS, PROBES
from protocol.wire.errors import Overloaded

LIST_COST = 10
"""Cost of a list besides its bytes, in reads: it needs many reads of the queue. Also the cost of an unknown URL, which
is compared with all routes."""

BYTES_PER_READ = 4096
"""Bytes of a list, and of other JSON beyond this size, that cost one more read, charged once they are sent."""

REQUESTS_PER_READ, FILES_PER_READ, ROWS_PER_READ, NAMES_PER_READ = 8, 32, 64, 128
"""Examined requests, files, rows of usage and adapter names that cost one read: some tenths of a millisecond."""

TOKENS_PER_READ, KEPT_BYTES_PER_READ = 512, 1 << 16
"""Tokens read from an answer's log, and bytes of a stored body, that cost one read."""

LISTS_AT_ONCE = 8
"""Maximum lists prepared for one tenant or address at a time."""

BURST_S = 5.0
"""Reads that may come at once, as seconds of the rate."""

MAX_DEBT_S = 30.0
"""Maximum seconds that a reader waits for the cost of its long lists."""

MAX_READERS = 10_000
"""Maximum readers remembered; the longest silent is forgotten, whose reads have been refilled by then."""


@dataclass(slots=True)
class _Reader:
    """The remaining reads of a tenant or an address."""

    name: str
    per_s: float
    left: float
    at_s: float  # time of `left`
    num_lists: int = 0  # lists being prepared

    def owe(self, cost: float) -> None:
        """Deduct a cost; the debt is limited."""
        self.left = max(self.left - cost, -MAX_DEBT_S * self.per_s)

    def refusal(self, cost: float) -> Overloaded:
        """Return the error for a read whose cost exceeds the remaining reads."""
        wait_s = (cost - self.left) / self.per_s
        limits = f"{self.per_s:g} reads per second (a list counts as {LIST_COST}, plus one per 4 kB)"
        text = f"{self.name} may make {limits}; retry in {wait_s:.1f} s"
        return Overloaded(text, max(wait_s, 1.0), "reads")


_READER: ContextVar[_Reader | None] = ContextVar("reader", default=None)
"""The reader of the current task's request; None for a call, or without a limit."""


def owe(cost: float) -> None:
    """Charge the current list for examined items, whether they are shown or not. cost: in reads."""
    reader = _READER.get()
    if reader is not None:
        reader.owe(cost)


def spend(cost: float) -> None:
    """Charge the current read for work about to be done. Raises Overloaded if its reader is in debt."""
    reader = _READER.get()
    if reader is None or cost < 1:  # covered by the request's own cost
        return
    if reader.left < 0:
        raise reader.refusal(1)
    reader.owe(cost)


class Reads:
    """Passes on requests other than calls while their sender has reads left, and answers the others with 429."""

    def __init__(self, app: ASGIApp, shape_of: ShapeOf, per_s: float, now_s: Callable[[], float] | None = None) -> None:
        """shape_of: the error format of a request's API. per_s: reads per second, 0 for no limit."""
        self._app = app
        self._shape_of = shape_of
        self._per_s = per_s
        self._now_s = now_s or (lambda: asyncio.get_running_loop().time())
        self._readers: dict[str, _Reader] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 429."""
        match: RouteMatch | None = scope[MATCH] if scope["type"] == "http" else None
        name = _name_of(scope) if match is not None and self._per_s and _is_counted(match) else ""
        if match is None or not name:
            await self._app(scope, receive, send)
            return
        is_list = scope["method"] in ("GET", "HEAD") and _path_of(match) in LISTS
        is_unknown = match.route is None and not match.allowed
        reader = self._reader(name)
        try:
            _take(reader, LIST_COST if is_list or is_unknown else 1, is_list=is_list)
        except Overloaded as error:
            await self._shape_of(scope).response(error)(scope, receive, send)
            return
        free = 0 if is_list else BYTES_PER_READ

        async def send_counted(message: Message) -> None:
            nonlocal free
            if message["type"] == "http.response.start":
                kind = header_of(message.get("headers", ()), b"content-type") or ""
                if not is_list and not kind.startswith("application/json"):
                    free = sys.maxsize  # streams and stored files cost no work besides sending
            else:
                num_bytes = len(message.get("body", b""))
                reader.owe(max(0, num_bytes - free) / BYTES_PER_READ)
                free = max(0, free - num_bytes)
            await send(message)

        reader.num_lists += is_list
        token = _READER.set(reader)
        try:
            await self._app(scope, receive, send_counted)
        finally:
            _READER.reset(token)
            reader.num_lists -= is_list

    def _reader(self, name: str) -> _Reader:
        """Return a reader with its reads refilled up to now. Readers are kept in order of their last read."""
        now_s, most = self._now_s(), BURST_S * self._per_s
        reader = self._readers.pop(name, None) or _Reader(name, self._per_s, most, now_s)
        reader.left = min(reader.left + (now_s - reader.at_s) * self._per_s, most)
        reader.at_s = now_s
        self._readers[name] = reader
        if len(self._readers) > MAX_READERS:
            del self._readers[next(iter(self._readers))]
        return reader


def _take(reader: _Reader, cost: int, *, is_list: bool) -> None:
    """Charge a reader for one more request. Raises Overloaded."""
    if is_list and reader.num_lists >= LISTS_AT_ONCE:
        raise Overloaded(
            f"{reader.num_lists} lists are being prepared for {reader.name}, which is the limit", 1.0, "reads"
        )
    if reader.left < cost:
        raise reader.refusal(cost)
    reader.left -= cost


def _is_counted(match: RouteMatch) -> bool:
    """Return whether a request has no other limit: calls and texts have their own, and probes are never refused."""
    return match.kind not in ("call", "text") and _path_of(match) not in PROBES


def _path_of(match: RouteMatch) -> str:
    """Return the path of a request's route; without a route, the request's own."""
    return match.route.path if match.route is not None else match.path


def _name_of(scope: Scope) -> str:
    """Return the reader's name: a tenant or, without keys, an address; "" for this machine."""
    caller: Caller = scope[CALLER]
    if caller.name:
        return f"tenant {caller.name}"
    address = client_of(scope)
    return f"address {address}" if address else ""
