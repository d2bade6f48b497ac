"""What the request that the current task works for costs this gateway: one object, from its arrival to its end.

`gate.py` opens it and closes it. In between, whoever learns more of the request says so here, before the work: how many
bytes its values, its prompt and its answer may take (`hold`), that it waits for something else, or has reached the
queue (`Admission.leave_inbound`), that its body is no longer held (`large.release`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from gateway.overload.memory import CALL_BYTES, Charge
from protocol.runtime.fair_slots import FairSlots

FREED_AT_ONCE = 1 << 9
"""Values that are freed before others have their turn."""


class LargeBody:
    """The body of a request that costs work, and its slot, if it is large enough to need one."""

    def __init__(self, tenant: str, bodies: FairSlots | None, work: FairSlots) -> None:
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


class RequestCost:
    """What a request counts for, and holds."""

    __slots__ = ("body", "charge", "cls", "is_inbound", "is_open")

    def __init__(self, charge: Charge | None = None) -> None:
        self.charge = charge  # the memory it is charged
        self.body: LargeBody | None = None  # None for a small one
        self.is_open = False  # counted among the calls in flight
        self.is_inbound = False  # on its way to the queue, which may still refuse it
        self.cls = ""  # class of its requests, once it is known

    def close(self) -> None:
        """Hold nothing any more."""
        if self.body is not None:
            self.body.release()
            self.body.free()
        if self.charge is not None:
            self.charge.close()


COST: ContextVar[RequestCost | None] = ContextVar("cost", default=None)
"""The cost of the request that the current task works for; None where it works for none."""


def is_inbound() -> bool:
    """Return whether the current task's call is on its way to the queue, which may still refuse it."""
    cost = COST.get()
    return cost is not None and cost.is_inbound


def body_of_task() -> LargeBody | None:
    """Return the body that the current task works on; None for a small one."""
    cost = COST.get()
    return None if cost is None else cost.body


def _charge() -> Charge | None:
    cost = COST.get()
    return None if cost is None else cost.charge


def held() -> int:
    """Return what the current task's call is charged."""
    charge = _charge()
    return 0 if charge is None else charge.num_bytes


def hold(num_bytes: int) -> None:
    """Charge the current task's call so many bytes in all. Raises as `Charge.hold`."""
    charge = _charge()
    if charge is not None:
        charge.hold(num_bytes)


def shared() -> Charge | None:
    """Return an empty charge on the current call's holder, for memory that outlives the call.

    The caller must close it. None where nothing is charged.
    """
    charge = _charge()
    return None if charge is None else charge.beside()


@contextmanager
def own_cost(charge: Charge | None) -> Iterator[None]:
    """Let the block count for itself: it holds a charge of its own, and works on no body of the current call's."""
    token = COST.set(RequestCost(charge))
    try:
        yield
    finally:
        COST.reset(token)


def hold_values(num_bytes: int, values_bytes: int) -> None:
    """Charge the current task's call for a body and the values that are about to be made of it."""
    hold(CALL_BYTES + 2 * num_bytes + values_bytes)


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
