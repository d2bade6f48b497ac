"""Large bodies: how many of them a gateway holds, and how many it works on at a time, shared evenly by tenants.

A small body is read, checked and tokenized as it comes. A large one costs up to a second of CPU and hundreds of
megabytes, so it waits for a place before it is read, and for its turn before each step of work. What a small one says
of its answer's form, in schemas, grammars and tools, may cost a hundred times as much as its other bytes: `Checks` does
that in a thread too, one at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.auth.callers import CALLER, Caller
from gateway.http.access import MATCH, Match
from gateway.http.addresses import client_of
from gateway.http.errors import ShapeOf
from gateway.http.headers import header_of
from gateway.http.paths import SMALL_BODY_BYTES
from protocol.wire.errors import Overloaded

T = TypeVar("T")

RETRY_S = 5.0
"""Retry-After of a body without a slot: the time until one is free is unknown."""


@dataclass(frozen=True, slots=True)
class LargeLimits:
    """Limits for large bodies."""

    num_bodies: int = 12  # held at once, from the first byte that is read to the queue: up to 60 MB each as objects
    num_of_tenant: int = 4  # slots per tenant
    num_waiting: int = 64  # unread bodies waiting for a slot
    num_turns: int = 1  # bodies processed at once; each takes up to 800 MB, for four million tokens


class Places:
    """A number of slots. A freed slot goes to the tenant that holds the fewest, in order of arrival."""

    def __init__(self, num: int, num_of_tenant: int = 0, num_waiting: int = 0) -> None:
        """`num_of_tenant`: maximum slots of one tenant, `num_waiting`: maximum waiting bodies; 0: no limit."""
        self._num = num
        self._num_of_tenant = num_of_tenant or num
        self._num_waiting = num_waiting
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}  # by tenant, in order of arrival

    @property
    def num_kept_waiting(self) -> int:
        """How many wait for a slot because of others: with more slots they would have one, within their own maximum."""
        if self._held.total() < self._num:
            return 0
        return sum(min(len(line), self._num_of_tenant - self._held[name]) for name, line in self._waiting.items())

    async def take(self, tenant: str) -> None:
        """Wait for a slot. Raises Overloaded when too many wait."""
        if not self._waiting and self._is_free(tenant):
            self._held[tenant] += 1
            return
        waiting = sum(map(len, self._waiting.values()))
        # A tenant may fill half of the line, so that there is always room for another.
        own = len(self._waiting.get(tenant, ()))
        if self._num_waiting and (waiting >= self._num_waiting or 2 * own >= self._num_waiting):
            raise Overloaded(
                f"{waiting} large bodies are waiting to be read; send a smaller one, or retry later", RETRY_S
            )
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, {})[turn] = None
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.give(tenant)  # it came too late
            else:
                self._leave(tenant, turn)
            raise

    def _leave(self, tenant: str, turn: asyncio.Future[None]) -> None:
        """Take somebody out of the line who waits no more, and so is not counted any more."""
        line = self._waiting.get(tenant, {})
        line.pop(turn, None)  # it may have been passed over meanwhile
        if not line:
            self._waiting.pop(tenant, None)

    def give(self, tenant: str) -> None:
        """Release a slot."""
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        self._hand_out()

    def _is_free(self, tenant: str) -> bool:
        return self._held.total() < self._num and self._held[tenant] < self._num_of_tenant

    def _hand_out(self) -> None:
        """Let those in who have a turn."""
        while True:
            able = [tenant for tenant in self._waiting if self._is_free(tenant)]
            if not able:
                return
            tenant = min(able, key=self._held.__getitem__)
            line = self._waiting.pop(tenant)
            turn = next(iter(line))
            del line[turn]
            if line:
                self._waiting[tenant] = line  # behind the other tenants
            if not turn.cancelled():
                self._held[tenant] += 1
                turn.set_result(None)


class LargeBody:
    """The body of a request that costs work, and its slot, if it is large enough to need one."""

    def __init__(self, tenant: str, bodies: Places | None, work: Places) -> None:
        """`bodies`: the owner of its slot."""
        self._tenant = tenant
        self._bodies = bodies
        self._work = work
        self._values: list[Any] = []

    async def take_turn(self) -> None:
        """Wait for a turn to work."""
        await self._work.take(self._tenant)

    def give_turn(self) -> None:
        """End a turn."""
        self._work.give(self._tenant)

    def keep(self, value: object) -> None:
        """Keep what a body was read into until `free`, so that nobody else frees it, and all at once."""
        self._values.append(value)

    def free(self) -> None:
        """Let go of what was kept, in a thread. Nobody may hold it otherwise."""
        if self._values:
            values, self._values = self._values, []
            asyncio.get_running_loop().run_in_executor(None, free_slowly, values)

    def release(self) -> None:
        """Release the slot, idempotently: the body is no longer held."""
        if self._bodies is not None:
            self._bodies.give(self._tenant)
            self._bodies = None


FREED_AT_ONCE = 1 << 9
"""Values that are freed before others have their turn."""

_BODY: ContextVar[LargeBody | None] = ContextVar("large_body", default=None)
"""The body that the current task works on; None for a small one."""


_TURNS: set[asyncio.Task[Any]] = set()
"""Work that goes on whether anybody waits for it or not."""


@asynccontextmanager
async def working() -> AsyncIterator[None]:
    """Work on the current task's body meanwhile: at once if it is small, else when it has its turn.

    Nothing may be awaited that depends on a client, or on another turn.
    """
    body = _BODY.get()
    if body is None:
        yield
        return
    await body.take_turn()
    try:
        yield
    finally:
        body.give_turn()


async def work(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return what a coroutine returns that works in threads, as `working` does.

    Threads cannot be cancelled: a cancelled caller leaves at once, but its turn lasts until the work ends. So no client
    can have more work done at a time by hanging up.
    """
    body = _BODY.get()
    return await make() if body is None else await _in_turn(body.take_turn, body.give_turn, make)


async def _in_turn(
    take: Callable[[], Coroutine[Any, Any, None]], give: Callable[[], None], make: Callable[[], Coroutine[Any, Any, T]]
) -> T:
    """Take a turn, which is given back when `make` has ended, even if nobody waits for it any more."""
    await take()
    task = asyncio.create_task(make())
    _TURNS.add(task)

    def end(task: asyncio.Task[Any]) -> None:
        _TURNS.discard(task)
        give()
        if not task.cancelled():
            task.exception()  # its caller has left

    task.add_done_callback(end)
    return await asyncio.shield(task)


FEW_BYTES = 1 << 11
"""Bytes of a body with schemas, grammars or tools up to which it is checked in the event loop: about a millisecond."""

PLAIN_BYTES = 1 << 14
"""The same of a body without."""

_FORMS = frozenset(
    {"tools", "response_format", "structured_outputs", "format", "text", "output_config", "grammar", "parameters",
     "guided_json", "guided_regex", "guided_choice", "guided_grammar", "regex", "ebnf", "json_schema", "stop_regex"}
)  # fmt: skip
"""Fields of any API's bodies that say, or whose fields say, which form an answer has, or what ends it."""


class Checks:
    """The checks of bodies that take more than a millisecond: in a thread, one at a time, by turns of tenants."""

    def __init__(self) -> None:
        self._turns = Places(1)

    async def do(self, make: Callable[[], T], fields: Collection[str], num_bytes: int, tenant: str) -> T:
        """Return what a function returns that checks a body, or raise what it raises.

        fields: those that the body has. num_bytes: its size.
        """
        if num_bytes <= (PLAIN_BYTES if _FORMS.isdisjoint(fields) else FEW_BYTES):
            return make()
        return await self.in_thread(make, tenant)

    async def in_thread(self, make: Callable[[], T], tenant: str) -> T:
        """Return what a function returns, or raise what it raises, in a thread, when it is the tenant's turn."""
        return await _in_turn(
            partial(self._turns.take, tenant), partial(self._turns.give, tenant), lambda: asyncio.to_thread(make)
        )


def keep(value: object) -> None:
    """Keep a value that the current task's body was read into until nobody else holds it; see `free`."""
    body = _BODY.get()
    if body is not None:
        body.keep(value)


def free() -> None:
    """Free what was kept of the current task's body, in a thread: nobody else holds it any more."""
    body = _BODY.get()
    if body is not None:
        body.free()


def free_slowly(values: list[Any], at_once: int = FREED_AT_ONCE) -> None:
    """Free lists and objects within each other, `at_once` of them, and empty the list that was given.

    Freeing the outermost would free all of them at once, which holds the interpreter for milliseconds.
    """
    for value in values:  # the list grows meanwhile: what is within a value comes after it
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
    value = None
    values.reverse()
    while values:
        del values[-at_once:]


def release() -> None:
    """Release the slot of the current task's body, if it has one: the body is no longer held."""
    body = _BODY.get()
    if body is not None:
        body.release()


class LargeBodies:
    """Lets requests with large bodies wait for a slot before any of the body is read."""

    def __init__(self, app: ASGIApp, shape_of: ShapeOf, limits: LargeLimits | None = None) -> None:
        """`shape_of`: how errors of a request are written."""
        limits = limits or LargeLimits()
        self._app = app
        self._shape_of = shape_of
        self._bodies = Places(limits.num_bodies, limits.num_of_tenant, limits.num_waiting)
        self._work = Places(limits.num_turns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 429."""
        match: Match | None = scope.get(MATCH)
        is_small = match is None or not match.is_large or _is_small(scope["headers"])
        # A text that is only tokenized passes no limit of calls, so it waits for its turn whatever its size.
        if match is None or (is_small and match.kind != "text"):
            await self._app(scope, receive, send)
            return
        tenant = _tenant_of(scope)
        if not is_small:
            try:
                await self._bodies.take(tenant)
            except Overloaded as error:
                await self._shape_of(scope).response(error)(scope, receive, send)
                return
        body = LargeBody(tenant, None if is_small else self._bodies, self._work)
        token = _BODY.set(body)
        try:
            await self._app(scope, receive, send)
        finally:
            _BODY.reset(token)
            body.release()
            body.free()


def _is_small(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return whether a request says that its body is small, or that there is none."""
    length = header_of(headers, b"content-length")
    if length is None:
        return header_of(headers, b"transfer-encoding") is None
    return length.isdecimal() and int(length) <= SMALL_BODY_BYTES


def _tenant_of(scope: Scope) -> str:
    """Return the holder of slots: a tenant, or without keys, an address."""
    caller: Caller = scope[CALLER]
    if caller.is_batch:
        return f"batches of {caller.owner}"
    return caller.name or client_of(scope)
