"""What everybody may list of the catalogue, which may have ten thousand names: read some hundreds at a time.

One list is made at a time for all clients, by turns of tenants, so that many lists hold up nobody and take the memory
of one; what was made is charged to its caller until it is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from gateway.auth.callers import Caller
from gateway.bodies.json_slices import dumps
from gateway.overload.large import Places
from gateway.overload.memory import held, hold
from protocol.queue.bus import Bus
from protocol.wire import messages as m

OBJECTS_AT_ONCE = 256
"""Objects that are made and written at a time."""


class Catalogue:
    """The names that a caller sees."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._turns = Places(1)

    @asynccontextmanager
    async def visible(self, caller: Caller) -> AsyncIterator[list[m.Alias]]:
        """Yield the aliases that a caller sees, by name, for as long as its turn lasts.

        A tenant's hides everybody's of the same name.
        """
        await self._turns.take(caller.name)
        try:
            by_name: dict[str, m.Alias] = {}
            async for alias in self._bus.adapters.each():
                is_shown = alias.tenant in ("", caller.name) and caller.sees(alias)
                if is_shown and (alias.tenant or alias.name not in by_name):
                    by_name[alias.name] = alias
            yield [by_name[name] for name in sorted(by_name)]
        finally:
            self._turns.give(caller.name)

    async def listed(
        self, caller: Caller, first: dict[str, Any], show: Callable[[m.Alias, m.AdapterRecord | None], dict[str, Any]]
    ) -> bytes:
        """Return the JSON list of an object and, by name, what is shown of every adapter that a caller sees.

        Raises as `memory.hold` when there is no room for it.
        """
        parts = [dumps([first])[:-1]]
        async with self.visible(caller) as aliases:
            for begin in range(0, len(aliases), OBJECTS_AT_ONCE):
                some = aliases[begin : begin + OBJECTS_AT_ONCE]
                records = await self._bus.adapters.records(sorted({alias.digest for alias in some if alias.digest}))
                parts.append(dumps([show(alias, records.get(alias.digest)) for alias in some])[1:-1])
                hold(held() + len(parts[-1]))
        return b",".join(parts) + b"]"
