"""Limits how many large bodies a gateway holds, and how many it processes at a time, shared evenly by tenants.

A small body is read, checked and tokenized at once. A large one takes up to a second of CPU and hundreds of megabytes,
so it waits for a slot before it is read, and for a turn before each step of work. Schemas, grammars and tools may cost
a hundred times as much as other bytes: `Checks` processes even small ones in a thread, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import Any, TypeVar

from gateway.overload.cost import COST, body_of_task, free_slowly
from protocol.runtime.fair_slots import FairSlots

T = TypeVar("T")

_TURNS: set[asyncio.Task[Any]] = set()
"""Tasks that run to their end even if their caller has left."""


class Working:
    """Context manager for processing the current task's body: a small one at once, a large one when it has its turn.

    The block must not wait for a client or for another turn.
    """

    async def __aenter__(self) -> None:
        """Wait for the turn."""
        self._body = body_of_task()
        if self._body is not None:
            await self._body.take_turn()

    async def __aexit__(self, *_: object) -> None:
        """End the turn."""
        if self._body is not None:
            self._body.give_turn()


async def work(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return the result of a coroutine that works in threads, run as within `Working`.

    Threads cannot be cancelled: a cancelled caller leaves at once, but its turn lasts until the work ends. So hanging
    up does not let a client have more work done at a time.
    """
    body = body_of_task()
    return await make() if body is None else await _in_turn(body.take_turn, body.give_turn, make)


async def _in_turn(
    take: Callable[[], Coroutine[Any, Any, None]], give: Callable[[], None], make: Callable[[], Coroutine[Any, Any, T]]
) -> T:
    """Take a turn and run `make`; the turn ends with `make`, even if the caller has left."""
    await take()
    task = asyncio.create_task(make())
    _TURNS.add(task)

    def end(task: asyncio.Task[Any]) -> None:
        _TURNS.discard(task)
        give()
        if not task.cancelled():
            task.exception()  # mark as retrieved: its caller may have left

    task.add_done_callback(end)
    return await asyncio.shield(task)


FEW_BYTES = 1 << 11
"""Maximum bytes of a body with schemas, grammars or tools that is checked on the event loop: about a millisecond."""

PLAIN_BYTES = 1 << 14
"""The same for a body without them."""

_FORMS = frozenset(
    {"tools", "response_format", "structured_outputs", "format", "text", "output_config", "grammar", "parameters",
     "guided_json", "guided_regex", "guided_choice", "guided_grammar", "regex", "ebnf", "json_schema", "stop_regex"}
)  # fmt: skip
"""Fields of any API's bodies that define, themselves or in nested fields, an answer's form or its end."""


class Checks:
    """Runs work of more than a millisecond in a thread, one at a time, round-robin by tenant."""

    def __init__(self) -> None:
        self._turns = FairSlots(1)

    async def do(self, make: Callable[[], T], fields: Collection[str], num_bytes: int, tenant: str) -> T:
        """Return the result of a function that checks a body, in a thread if that may be slow. Raises as the function.

        fields: names of the body's fields. num_bytes: size of the body.
        """
        if num_bytes <= (PLAIN_BYTES if _FORMS.isdisjoint(fields) else FEW_BYTES):
            return make()
        return await self.in_thread(make, tenant)

    async def in_thread(self, make: Callable[[], T], tenant: str) -> T:
        """Return the result of a function, run in a thread when it is the tenant's turn. Raises as the function."""
        return await _in_turn(
            partial(self._turns.take, tenant), partial(self._turns.give, tenant), lambda: asyncio.to_thread(make)
        )


def keep(value: object, num_bytes: int = 0) -> None:
    """Keep an object until `free`: one made from the current task's large body, or from `num_bytes` of stored JSON."""
    cost = COST.get()
    if cost is None or (cost.body is None and num_bytes <= PLAIN_BYTES):
        return
    if not any(kept is value for kept in cost.values):
        cost.values.append(value)


def free() -> None:
    """Free the kept objects of the current task's request in a thread. There must be no other references to them."""
    cost = COST.get()
    if cost is not None:
        cost.free()


async def freed(values: list[Any]) -> None:
    """Free nested values in a thread, and empty the list, which must hold the only references to them."""
    await asyncio.to_thread(free_slowly, values)


def release() -> None:
    """Release the slot of the current task's body, if it has one, because the body is no longer held."""
    body = body_of_task()
    if body is not None:
        body.release()
