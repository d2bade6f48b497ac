"""How much a tenant may ask beside calls, which have their limits: each read costs something, a list more.

Nothing but a call goes into the queue, so none of the limits of calls holds it: without one of their own, clients that
list and list would take the loop from everybody's streams. What counts is the work, not what comes of it: a page that
shows nothing costs what was looked at for it.
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
"""What a list costs beside its bytes, in reads: it is put together of many looks into the queue. So does a URL of no
route, which is compared with those of all."""

BYTES_PER_READ = 4096
"""Bytes of a list, and of other JSON beyond the first so many, that cost a read more, known once they are sent."""

REQUESTS_PER_READ, FILES_PER_READ, ROWS_PER_READ, NAMES_PER_READ = 8, 32, 64, 128
"""Looks at requests, files, rows of usage and names of adapters that cost a read: some tenths of a millisecond."""

TOKENS_PER_READ, KEPT_BYTES_PER_READ = 512, 1 << 16
"""The same of an answer's tokens that are read from its log, and of the bytes of a body that was kept."""

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

    name: str
    per_s: float
    left: float
    at_s: float  # when that was
    num_lists: int = 0  # lists being prepared

    def owe(self, cost: float) -> None:
        """Have less left, or a debt, which has an end."""
        self.left = max(self.left - cost, -MAX_DEBT_S * self.per_s)

    def refusal(self, cost: float) -> Overloaded:
        """Return the error of a read for which not enough is left."""
        wait_s = (cost - self.left) / self.per_s
        limits = f"{self.per_s:g} reads per second (a list counts as {LIST_COST}, plus one per 4 kB)"
        text = f"{self.name} may make {limits}; retry in {wait_s:.1f} s"
        return Overloaded(text, max(wait_s, 1.0), "reads")


_READER: ContextVar[_Reader | None] = ContextVar("reader", default=None)
"""Whose read the current task answers; None for what is no read, or has no limit."""


def owe(cost: float) -> None:
    """Let the current list cost so many reads more, for what has been looked at, whether it is shown or not."""
    reader = _READER.get()
    if reader is not None:
        reader.owe(cost)


def spend(cost: float) -> None:
    """Let the current read cost so many more before they are made. Raises Overloaded if its reader has none left."""
    reader = _READER.get()
    if reader is None or cost < 1:  # already paid for
        return
    if reader.left < 0:
        raise reader.refusal(1)
    reader.owe(cost)


class Reads:
    """Lets requests that are no calls in as far as their senders have any left, and answers the others with 429."""

    def __init__(self, app: ASGIApp, shape_of: ShapeOf, per_s: float, now_s: Callable[[], float] | None = None) -> None:
        """`shape_of`: how errors of a request are written. `per_s`: reads a second, 0 for no limit."""
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
                    free = sys.maxsize  # a stream, or a file as it lies: no work but to send it
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
        """Return a reader with what it has left now. The others stay in the order in which they have read."""
        now_s, most = self._now_s(), BURST_S * self._per_s
        reader = self._readers.pop(name, None) or _Reader(name, self._per_s, most, now_s)
        reader.left = min(reader.left + (now_s - reader.at_s) * self._per_s, most)
        reader.at_s = now_s
        self._readers[name] = reader
        if len(self._readers) > MAX_READERS:
            del self._readers[next(iter(self._readers))]
        return reader


def _take(reader: _Reader, cost: int, *, is_list: bool) -> None:
    """Let a reader read once more. Raises Overloaded."""
    if is_list and reader.num_lists >= LISTS_AT_ONCE:
        raise Overloaded(
            f"{reader.num_lists} lists are being prepared for {reader.name}, which is the limit", 1.0, "reads"
        )
    if reader.left < cost:
        raise reader.refusal(cost)
    reader.left -= cost


def _is_counted(match: RouteMatch) -> bool:
    """Return whether a request has no other limit: calls have theirs, texts take turns, probes are never refused."""
    return match.kind not in ("call", "text") and _path_of(match) not in PROBES


def _path_of(match: RouteMatch) -> str:
    """Return the path of a request's route, however the request spells it; its own where it has no route."""
    return match.route.path if match.route is not None else match.path


def _name_of(scope: Scope) -> str:
    """Return who reads: a tenant, or where there are no keys, an address; "" for this machine's own."""
    caller: Caller = scope[CALLER]
    if caller.name:
        return f"tenant {caller.name}"
    address = client_of(scope)
    return f"address {address}" if address else ""
