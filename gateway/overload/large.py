"""Large bodies: how many of them a gateway holds, and how many it works on at a time, shared evenly by tenants.

A small body is read, checked and tokenized as it comes. A large one costs up to a second of CPU and hundreds of
megabytes, so it waits for a place before it is read, and for its turn before each step of work. What a small one says
of its answer's form, in schemas, grammars and tools, may cost a hundred times as much as its other bytes: `Checks` does
that in a thread too, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import Any, TypeVar

from gateway.overload.cost import body_of_task
from protocol.runtime.fair_slots import FairSlots

T = TypeVar("T")

_TURNS: set[asyncio.Task[Any]] = set()
"""Work that goes on whether anybody waits for it or not."""


class Working:
    """Work on the current task's body meanwhile: at once if it is small, else when it has its turn.

    Nothing may be awaited that depends on a client, or on another turn.
    """

    async def __aenter__(self) -> None:
        """Wait for the turn."""
        self._body = body_of_task()
        if self._body is not None:
            await self._body.take_turn()

    async def __aexit__(self, *_: object) -> None:
        """End it."""
        if self._body is not None:
            self._body.give_turn()


async def work(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return what a coroutine returns that works in threads, as within `Working`.

    Threads cannot be cancelled: a cancelled caller leaves at once, but its turn lasts until the work ends. So no client
    can have more work done at a time by hanging up.
    """
    body = body_of_task()
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
    """What takes more than a millisecond, in a thread, one at a time, by turns of tenants: checks of bodies, rows."""

    def __init__(self) -> None:
        self._turns = FairSlots(1)

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
    body = body_of_task()
    if body is not None:
        body.keep(value)


def free() -> None:
    """Free what was kept of the current task's body, in a thread: nobody else holds it any more."""
    body = body_of_task()
    if body is not None:
        body.free()


def release() -> None:
    """Release the slot of the current task's body, if it has one: the body is no longer held."""
    body = body_of_task()
    if body is not None:
        body.release()
