"""What the current task's request costs this gateway: one object, from its arrival to its end.

`gate.py` opens and closes it. In between, code that learns more updates it before the work: the bytes that values,
prompt and answer may take (`hold`), that the call waits for something else or has reached the queue
(`Admission.leave_inbound`), and that its body is no longer held (`large.release`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from gateway.overload.call_load import CallLoad
from gateway.overload.memory import CALL_BYTES, Charge
from protocol.runtime.fair_slots import FairSlots

FREED_AT_ONCE = 1 << 9
"""Values freed before other threads run."""


class LargeBody:
    """The body of a request whose processing is limited, and its slot, if it is large enough to need one."""

    def __init__(self, tenant: str, bodies: FairSlots | None, work: FairSlots) -> None:
        """bodies: the slots of large bodies, one of which it has; None for a small body."""
        self._tenant = tenant
        self._bodies = bodies
        self._work = work

    async def take_turn(self) -> None:
        """Wait for a turn to process the body."""
        await self._work.take(self._tenant)

    def give_turn(self) -> None:
        """End a turn."""
        self._work.give(self._tenant)

    def release(self) -> None:
        """Release the slot, because the body is no longer held. Idempotent."""
        if self._bodies is not None:
            self._bodies.give(self._tenant)
            self._bodies = None


class RequestCost:
    """What a request holds and is counted as."""

    __slots__ = ("body", "charge", "is_inbound", "is_open", "load", "values")

    def __init__(self, charge: Charge | None = None) -> None:
        self.charge = charge  # its charge of memory
        self.body: LargeBody | None = None  # None for a small body
        self.is_open = False  # counted among the calls in flight
        self.is_inbound = False  # counted as inbound
        self.load: CallLoad | None = None  # its load as far as it is known, while it is inbound and counted
        self.values: list[Any] = []  # large objects, kept so that they are not freed all at once elsewhere

    def free(self) -> None:
        """Free the kept objects in a thread. There must be no other references to them."""
        if self.values:
            values, self.values = self.values, []
            asyncio.get_running_loop().run_in_executor(None, free_slowly, values)

    def close(self) -> None:
        """Release everything held."""
        if self.body is not None:
            self.body.release()
        self.free()
        if self.charge is not None:
            self.charge.close()


COST: ContextVar[RequestCost | None] = ContextVar("cost", default=None)
"""The cost of the current task's request; None if the task works for none."""


def is_inbound() -> bool:
    """Return whether the current task's call is inbound: not queued yet, and may be refused."""
    cost = COST.get()
    return cost is not None and cost.is_inbound


def body_of_task() -> LargeBody | None:
    """Return the current task's body; None for a small one."""
    cost = COST.get()
    return None if cost is None else cost.body


def _charge() -> Charge | None:
    cost = COST.get()
    return None if cost is None else cost.charge


def held() -> int:
    """Return the bytes charged to the current task's call."""
    charge = _charge()
    return 0 if charge is None else charge.num_bytes


def hold(num_bytes: int) -> None:
    """Set the current task's charge to `num_bytes` in total. Raises as `Charge.hold`."""
    charge = _charge()
    if charge is not None:
        charge.hold(num_bytes)


def shared() -> Charge | None:
    """Return an empty charge on the current call's holder, for memory that outlives the call.

    The caller must close it. None if the current task has no charge.
    """
    charge = _charge()
    return None if charge is None else charge.beside()


@contextmanager
def own_cost(charge: Charge | None) -> Iterator[None]:
    """Run the block with a cost of its own: with the given charge, and without the current call's body."""
    cost = RequestCost(charge)
    token = COST.set(cost)
    try:
        yield
    finally:
        COST.reset(token)
        cost.free()


def hold_values(num_bytes: int, values_bytes: int) -> None:
    """Charge the current task's call for a body and the values about to be parsed from it."""
    hold(CALL_BYTES + 2 * num_bytes + values_bytes)


def free_slowly(values: list[Any], at_once: int = FREED_AT_ONCE) -> None:
    """Free nested lists and objects, `at_once` at a time, and empty the given list.

    Freeing the outermost would free all at once, which holds the GIL for milliseconds.
    """
    for value in values:  # the list grows during the loop: children are appended
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
    value = None
    values.reverse()
    while values:
        del values[-at_once:]
