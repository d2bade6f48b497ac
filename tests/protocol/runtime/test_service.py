"""Loops that must not end: a process does not survive the end of one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from protocol.runtime.service import unending


async def end() -> None:
    pass


async def cancel_itself() -> None:
    """Raise CancelledError, like a library that leaks the cancellation of its own future."""
    raise asyncio.CancelledError


async def wait() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(("work", "why"), [(end, "has ended"), (cancel_itself, "from within")])
async def test_a_loop_that_ends_by_itself_ends_its_group(work: Callable[[], Awaitable[None]], why: str) -> None:
    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(unending(work))
            group.create_task(wait())

    with pytest.raises(ExceptionGroup) as raised:
        await run()
    assert why in str(raised.value.exceptions[0])


async def test_a_loop_may_be_cancelled_and_may_end_when_told_to() -> None:
    stop = asyncio.Event()
    stop.set()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(unending(wait))
        group.create_task(unending(end, until=stop))
        await asyncio.sleep(0)
        waiting.cancel()
    assert waiting.cancelled()
