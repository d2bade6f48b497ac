"""Slots that tenants share evenly, for large bodies and other long work."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from protocol.wire.errors import LorafleetError, Overloaded

RETRY_S = 5.0
"""Retry-After in seconds for a body without a slot: when a slot will be free is unknown."""


def _bodies_wait(num: int) -> LorafleetError:
    return Overloaded(f"{num} large bodies are waiting to be read; send a smaller one, or retry later", RETRY_S)


class FairSlots:
    """A number of slots. A free slot goes to the waiting tenant that holds the fewest, then by order of arrival."""

    def __init__(
        self,
        num: int,
        num_of_tenant: int = 0,
        num_waiting: int = 0,
        num_waiting_of_tenant: int = 0,
        full: Callable[[int], LorafleetError] = _bodies_wait,
    ) -> None:
        """num_of_tenant: maximum slots per tenant. num_waiting: maximum number that wait. 0: no limit.

        num_waiting_of_tenant: maximum number of one tenant that wait; 0: half of `num_waiting`, which leaves room for
        others. full: creates the error from the number that wait.
        """
        self._num = num
        self._num_of_tenant = num_of_tenant or num
        self._num_waiting = num_waiting
        self._num_waiting_of_tenant = num_waiting_of_tenant or (num_waiting + 1) // 2
        self._full = full
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}  # by tenant, in order of arrival

    @property
    def num_kept_waiting(self) -> int:
        """How many wait for a slot that others hold: they are within their tenant's maximum, but no slot is free."""
        if self._held.total() < self._num:
            return 0
        return sum(min(len(line), self._num_of_tenant - self._held[name]) for name, line in self._waiting.items())

    def check(self, tenant: str) -> None:
        """Raise the error of `full` if no more callers of a tenant may wait."""
        waiting, own = sum(map(len, self._waiting.values())), len(self._waiting.get(tenant, ()))
        if self._num_waiting and (waiting >= self._num_waiting or own >= self._num_waiting_of_tenant):
            raise self._full(waiting)

    @asynccontextmanager
    async def held(self, tenant: str) -> AsyncGenerator[None]:
        """Wait for a slot, and hold it until the block ends. Raises as `check`."""
        await self.take(tenant)
        try:
            yield
        finally:
            self.give(tenant)

    async def take(self, tenant: str) -> None:
        """Wait for a slot. Raises as `check`."""
        if not self._waiting and self._is_free(tenant):
            self._held[tenant] += 1
            return
        self.check(tenant)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, {})[turn] = None
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.give(tenant)  # the slot was assigned at the moment of the cancellation
            else:
                self._leave(tenant, turn)
            raise

    def _leave(self, tenant: str, turn: asyncio.Future[None]) -> None:
        """Remove a cancelled caller from the line, so that it no longer counts as waiting."""
        line = self._waiting.get(tenant, {})
        line.pop(turn, None)  # it may have been skipped already
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
        """Assign free slots to waiting callers."""
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
