"""Waits for the condition that a test expects, instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def wait_until(
    predicate: Callable[[], Any | Awaitable[Any]],
    description: str | Callable[[], str],
    *,
    timeout_s: float = 60.0,
    every_s: float = 0.01,
) -> Any:
    """Return the first true value of `predicate`. Raises AssertionError naming `description` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() >= deadline:
            text = description if isinstance(description, str) else description()
            raise AssertionError(f"gave up waiting until {text}")
        await asyncio.sleep(every_s)
