"""Lists of the catalogue, which may have ten thousand names, served from a sorted copy.

A gateway reads the catalogue when a list is requested and it has changed: some hundreds of names at a time, once for
all concurrent callers, and for at most a tenth of the time. A complete list is serialized once for all callers that see
the same names. So a list costs one page, or one cache lookup, for any number of callers.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import Any, TypeVar

from gateway.auth.callers import Caller
from gateway.bodies.json_slices import dumps
from gateway.overload import reads
from gateway.overload.cost import held, hold
from gateway.overload.loop_slice import LoopSlice, each
from protocol.queue.bus import Bus
from protocol.runtime.fair_slots import FairSlots
from protocol.wire import messages as m

T = TypeVar("T")

OBJECTS_AT_ONCE = 64
"""Objects read from the queue, and serialized, at a time."""

MAX_AGE_S = 10.0
"""Maximum seconds for which a copy with an unchanged stamp is used: stores of older versions write no stamp."""

REST, MAX_REST_S = 9, 2.0
"""Pause between two reads, as a multiple of the last one's duration; and its maximum in seconds."""

MAX_KEPT = 64
MAX_KEPT_BYTES = 16 << 20
"""Maximum number, and bytes, of cached lists of all tenants, as serialized."""


class Copy:
    """A snapshot of all names, sorted by name; shared ones come before tenants'."""

    def __init__(self, number: int, stamp: bytes) -> None:
        self.number = number  # serial number of the read
        self.stamp = stamp  # the catalogue's stamp before the read
        self.read_s = 0.0  # loop time of its end
        self.keys: list[str] = []
        self.tenants: set[str] = set()
        self._aliases: dict[str, m.Alias] = {}

    def add(self, aliases: list[m.Alias]) -> None:
        """Add some hundreds of aliases. Merging sorted runs takes time linear in the length of the list."""
        some = {f"{alias.name}\0{alias.tenant}": alias for alias in aliases}
        self._aliases |= some
        self.tenants |= {alias.tenant for alias in aliases}
        self.keys += sorted(some)
        self.keys.sort()

    async def after(self, name: str, tenant: str | None) -> AsyncIterator[m.Alias]:
        """Yield the aliases after a tenant's name (None: after all tenants') in order, in slices of the event loop."""
        begin = bisect_right(self.keys, f"{name}\0{tenant}" if tenant is not None else f"{name}\0\U0010ffff")
        turn = LoopSlice()
        for number in range(begin, len(self.keys)):
            yield self._aliases[self.keys[number]]
            await turn.pause()


class CatalogueCopy:
    """Serves lists of the names that a caller sees, from a copy of the catalogue."""

    def __init__(self, bus: Bus, max_age_s: float = MAX_AGE_S) -> None:
        """max_age_s: maximum age of the copy if its stamp does not change."""
        self._bus = bus
        self._max_age_s = max_age_s
        self._turns = FairSlots(1)
        self._copy: Copy | None = None
        self._num_begun = 0
        self._reading: asyncio.Task[None] | None = None
        self._rested_s = 0.0  # loop time (s) of the next allowed read
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()  # values and bytes, oldest use first
        self._kept_bytes = 0

    async def copy(self) -> Copy:
        """Return all names, including every change made before this call. Raises a connection error."""
        loop, asked = asyncio.get_running_loop(), self._num_begun
        while True:
            stamp, copy = await self._bus.adapters.stamp(), self._copy
            if copy is not None and (
                copy.number > asked or (copy.stamp == stamp and loop.time() - copy.read_s < self._max_age_s)
            ):
                return copy
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read())
            reading = self._reading
            await asyncio.wait([reading])
            reading.result()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        if (rest_s := self._rested_s - loop.time()) > 0:
            await asyncio.sleep(rest_s)
        self._num_begun += 1
        begun_s = loop.time()
        copy = Copy(self._num_begun, await self._bus.adapters.stamp())
        async for some in self._bus.adapters.some():
            copy.add(some)
            await asyncio.sleep(0)
        copy.read_s = loop.time()
        self._rested_s = copy.read_s + min(REST * (copy.read_s - begun_s), MAX_REST_S)
        self._copy = copy
        self._kept.clear()
        self._kept_bytes = 0

    # ------------------------------------------------------------ pages

    async def page(self, after: str, limit: int, shows: Callable[[m.Alias], bool]) -> tuple[list[m.Alias], bool]:
        """Return the next `limit` aliases for which `shows` is true, and whether there are more.

        after: `NAME,TENANT`, the end of the previous page. A bare name skips every tenant's adapter of that name.
        """
        name, has_tenant, tenant = after.partition(",")  # no name has a comma
        found: list[m.Alias] = []
        async for alias in (await self.copy()).after(name, tenant if has_tenant or not after else None):
            reads.owe(1 / reads.NAMES_PER_READ)
            if shows(alias):
                if len(found) == limit:
                    return found, True
                found.append(alias)
        return found, False

    # ------------------------------------------------------------ whole lists

    async def served(self, caller: Caller) -> list[m.Alias]:
        """Return the aliases of adapters on disk that a caller sees, as `_visible` does."""

        async def make(copy: Copy) -> list[m.Alias]:
            return [alias for alias in await self._visible(copy, caller) if alias.state == "on_disk"]

        return await self._made(caller, "served", make, lambda made: 64 + 8 * len(made))

    async def records(self, aliases: Sequence[m.Alias]) -> AsyncIterator[tuple[m.Alias, m.AdapterRecord | None]]:
        """Yield aliases with their adapters' records, None for a record that has just been removed."""
        async for pairs in self._with_records(aliases):
            for pair in pairs:
                yield pair

    async def _with_records(
        self, aliases: Sequence[m.Alias]
    ) -> AsyncIterator[list[tuple[m.Alias, m.AdapterRecord | None]]]:
        """Yield the pairs of `records` in lists of OBJECTS_AT_ONCE, each from one read of the queue."""
        for begin in range(0, len(aliases), OBJECTS_AT_ONCE):
            some = aliases[begin : begin + OBJECTS_AT_ONCE]
            records = await self._bus.adapters.records(sorted({alias.digest for alias in some if alias.digest}))
            yield [(alias, records.get(alias.digest)) for alias in some]

    async def _visible(self, copy: Copy, caller: Caller) -> list[m.Alias]:
        """Return the aliases that a caller sees, by name. A tenant's adapter hides a shared one of the same name."""
        by_name: dict[str, m.Alias] = {}
        async for alias in copy.after("", ""):
            if alias.tenant in ("", caller.name) and caller.sees(alias):
                by_name[alias.name] = alias  # shared ones come before the tenant's
        return list(by_name.values())

    async def listed(
        self,
        caller: Caller,
        view: Hashable,
        first: Sequence[dict[str, Any]],
        show: Callable[[m.Alias, m.AdapterRecord | None], dict[str, Any] | None],
    ) -> bytes:
        """Return a JSON list of `first`, then the objects of all adapters that a caller sees, by name.

        view: cache key of what `first` and `show` depend on besides the adapters. show: returns an adapter's object,
        None to omit it. Raises as `cost.hold` if there is no memory for it.
        """

        async def make(copy: Copy) -> bytes:
            parts = [dumps(list(first))[:-1]]
            aliases = await self._visible(copy, caller)
            async for pairs in self._with_records(aliases):
                objects = await each(pairs, lambda pair: show(*pair))
                if objects := [one for one in objects if one is not None]:
                    parts.append(dumps(objects)[1:-1])
                    hold(held() + len(parts[-1]))
            return b",".join(parts) + b"]"

        before = held()
        whole = await self._made(caller, view, make, len)
        hold(before + len(whole))
        return whole

    async def _made(
        self, caller: Caller, view: Hashable, make: Callable[[Copy], Awaitable[T]], num_bytes: Callable[[T], int]
    ) -> T:
        """Return `make(copy)`, cached for all callers with equal rights."""
        copy = await self.copy()
        own = caller.name if caller.name in copy.tenants else ""
        seen = None if caller.tenant is None or caller.is_admin else caller.tenant.adapters
        key = (copy.number, view, own, seen)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        async with self._turns.held(caller.name):
            if key in self._kept:  # made in the meantime
                return self._kept[key][0]
            made = await make(copy)
            if copy is self._copy:
                self._keep(key, made, num_bytes(made))
            return made

    def _keep(self, key: Hashable, made: Any, num_bytes: int) -> None:
        self._kept[key] = made, num_bytes
        self._kept_bytes += num_bytes
        while len(self._kept) > 1 and (len(self._kept) > MAX_KEPT or self._kept_bytes > MAX_KEPT_BYTES):
            _, (_, dropped) = self._kept.popitem(last=False)
            self._kept_bytes -= dropped
