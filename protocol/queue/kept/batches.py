"""The records of batches, and which gateway runs which.

A gateway runs a batch for a few seconds at a time, and says again and again that it goes on. When it has been silent
another one takes the batch over under a higher epoch, by which the first one can write no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from protocol.queue.connection.redis_client import Client
from protocol.queue.scripts import Scripts
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.codec import decode
from protocol.wire.keys import Keys

FORGOTTEN_MS = 60_000
"""Life time of what is written of a batch that has expired."""


@dataclass(frozen=True, slots=True)
class ClaimedBatch:
    """A batch that a gateway runs."""

    batch: m.Batch
    epoch: int
    cancelled_ms: int  # when its client cancelled it, 0 if not


class Batches:
    """The batches of a fleet, by id."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    # ------------------------------------------------------------ running

    async def open(self, batch: m.Batch, *, ttl_ms: int, max_open: int) -> int:
        """Take a batch. Returns -1, or how many the tenant has open where it is not taken since these are too many."""
        keys = self._keys
        names = [
            keys.tag, keys.batch(batch.id), keys.batches(batch.tenant), keys.open_batches,
            keys.open_batches_of(batch.tenant),
        ]  # fmt: skip
        args = [batch.id, batch.tenant, m.encode(batch), batch.created_ms, ttl_ms, max_open]
        return int(await self._scripts.open_batch(keys=names, args=args))

    async def waiting(self, num: int) -> list[tuple[str, str]]:
        """Return at most `num` batches that nobody runs, the new ones first: tenant and id."""
        found = await self._redis.zrangebyscore(self._keys.open_batches, "-inf", now_ms(), start=0, num=num)
        parts = [member.decode().partition(":") for member in found]
        return [(tenant, batch_id) for tenant, _, batch_id in parts]

    async def claim(self, batch_id: str, tenant: str, gid: str, lease_ms: int) -> ClaimedBatch | None:
        """Run a batch, or go on running it, for `lease_ms`. None when another gateway does, or it has ended."""
        keys = self._keys
        names = [keys.tag, keys.batch(batch_id), keys.open_batches]
        reply = await self._scripts.claim_batch(keys=names, args=[batch_id, tenant, gid, lease_ms])
        return ClaimedBatch(decode(reply[2], m.Batch), reply[0], reply[1]) if reply else None

    async def save(self, batch: m.Batch, epoch: int, *, leaves: bool = False) -> bool:
        """Write how far a batch is. Returns False when another gateway runs it by now, or it has ended.

        leaves: this gateway runs it no longer, and another may.
        """
        keys = self._keys
        names = [keys.tag, keys.batch(batch.id), keys.open_batches, keys.open_batches_of(batch.tenant)]
        end = "1" if batch.status in m.ENDED_BATCH else "0" if leaves else ""
        args = [batch.id, batch.tenant, epoch, m.encode(batch), end, batch.status]
        return bool(await self._scripts.save_batch(keys=names, args=args))

    # ------------------------------------------------------------ asking

    async def get(self, batch_id: str, tenant: str) -> m.Batch | None:
        """Return a tenant's batch; None if it is unknown, another's, or has expired."""
        found = [batch for batch in await self.get_many([batch_id]) if batch.tenant == tenant]
        return found[0] if found else None

    async def get_many(self, batch_ids: Sequence[str]) -> list[m.Batch]:
        """Return those of these batches that are known, in their order; one that was cancelled and goes on says so."""
        pipe = self._redis.pipeline(transaction=False)
        for batch_id in batch_ids:
            pipe.hmget(self._keys.batch(batch_id), ("b", "cancel"))
        return [_shown(decode(raw, m.Batch), cancel) for raw, cancel in await pipe.execute() if raw]

    async def cancel(self, batch_id: str) -> None:
        """Ask for the end of a batch that is known."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.hsetnx(self._keys.batch(batch_id), "cancel", str(now_ms()))
        pipe.pexpire(self._keys.batch(batch_id), FORGOTTEN_MS, nx=True)  # should it have expired just now
        await pipe.execute()

    async def rank(self, tenant: str, batch_id: str) -> int | None:
        """Return how many of a tenant's batches are newer than one; None when it is unknown."""
        return await self._redis.zrevrank(self._keys.batches(tenant), batch_id)

    async def newest(self, tenant: str, start: int, num: int) -> list[str]:
        """Return the ids of a tenant's batches `[start, start + num)`, newest first."""
        found = await self._redis.zrevrange(self._keys.batches(tenant), start, start + num - 1)
        return [batch_id.decode() for batch_id in found]


def _shown(batch: m.Batch, cancel: bytes | None) -> m.Batch:
    if cancel is None:
        return batch
    status = batch.status if batch.status in m.ENDED_BATCH else "cancelling"
    return msgspec.structs.replace(batch, status=status, cancelling_ms=int(cancel))
