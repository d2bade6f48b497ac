"""The records of batches, and the gateway that runs each.

A gateway runs a batch under a lease of a few seconds, which it renews. When the lease has expired, another gateway
takes the batch over under a higher epoch, so that the first one can no longer write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from protocol.metrics.series import UNREADABLE
from protocol.queue.connection.redis_client import Client
from protocol.queue.dead_letters import names_in, set_aside
from protocol.queue.kept import signatures as lua
from protocol.queue.kept.readable import readable
from protocol.queue.scripts import Scripts
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.codec import decode_record
from protocol.wire.errors import NewerRecord, UnreadableRecord
from protocol.wire.keys import Keys

MAX_KEPT = 1000
"""Batches of a tenant whose records are kept; more only if more are open."""

FORGOTTEN_MS = 60_000
"""TTL in ms of what is written for a batch that has expired."""


@dataclass(frozen=True, slots=True)
class ClaimedBatch:
    """A batch that a gateway has claimed."""

    batch: m.Batch
    epoch: int
    cancelled_ms: int  # unix ms when its client cancelled it; 0: it did not
    tries: int = 0  # consecutive tries without progress: failed ones, and those whose gateway died


class Batches:
    """The batches of a fleet, by id."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    # ------------------------------------------------------------ running

    async def open(self, batch: m.Batch, *, ttl_ms: int, max_open: int, max_kept: int = MAX_KEPT) -> int:
        """Accept a batch and return -1; if the tenant has `max_open` open, return that number instead.

        If the tenant then has more than `max_kept`, its oldest ended ones are dropped.
        """
        keys = self._keys
        call = lua.OpenBatch(
            batch=keys.batch(batch.id), batches=keys.batches(batch.tenant), open_batches=keys.open_batches,
            tenant_open=keys.open_batches_of(batch.tenant), id=batch.id, tenant=batch.tenant, record=m.encode(batch),
            created_ms=batch.created_ms, ttl_ms=ttl_ms, max_open=max_open, max_kept=max_kept,
        )  # fmt: skip
        return int(await self._scripts.run(call))

    async def waiting(self, num: int) -> list[tuple[str, str]]:
        """Return (tenant, id) of at most `num` started batches that are due, then of as many that never ran.

        Among the latter, every tenant's first batch comes before any tenant's second.
        """
        pipe = self._redis.pipeline(transaction=False)
        pipe.zrangebyscore(self._keys.open_batches, "-inf", "(1", start=0, num=num)
        pipe.zrangebyscore(self._keys.open_batches, 1, now_ms(), start=0, num=num)
        new, begun = await pipe.execute()
        names = await names_in(self._scripts, self._keys, self._keys.open_batches, [*begun, *new], 2)
        return [(tenant, batch_id) for tenant, _, batch_id in (name.partition(":") for name in names)]

    async def claim(self, batch_id: str, tenant: str, gid: str, lease_ms: int) -> ClaimedBatch | None:
        """Claim a batch for `lease_ms`, or renew the lease. None if another gateway has it or it has ended.

        An unreadable batch is ended as failed, and its record becomes a dead letter. Raises NewerRecord.
        """
        call = lua.ClaimBatch(
            batch=self._keys.batch(batch_id),
            open_batches=self._keys.open_batches,
            id=batch_id,
            tenant=tenant,
            gid=gid,
            lease_ms=lease_ms,
        )
        reply = await self._scripts.run(call)
        if not reply:
            return None
        try:
            return ClaimedBatch(decode_record(reply[2], m.Batch), *reply[:2], tries=reply[3])
        except NewerRecord:
            raise
        except UnreadableRecord as error:
            UNREADABLE.labels(m.Batch.__name__).inc()
            await self._end_unreadable(batch_id, tenant, reply[0], reply[2], error.message)
            return None

    async def _end_unreadable(self, batch_id: str, tenant: str, epoch: int, raw: bytes, reason: str) -> None:
        """Set the unreadable record of a batch aside, and write a failed batch in its place."""
        await set_aside(self._scripts, self._keys, self._keys.batch(batch_id), raw, reason)
        created_ms = int(await self._redis.zscore(self._keys.batches(tenant), batch_id) or now_ms())
        problem = m.BatchProblem(code="record_unreadable", message="what was noted of this batch cannot be read")
        failed = m.Batch(
            id=batch_id, tenant=tenant, endpoint="", input_file="", created_ms=created_ms, expires_ms=created_ms,
            status="failed", problems=[problem], ended_ms=now_ms(),
        )  # fmt: skip
        await self.save(failed, epoch)

    async def save(
        self, batch: m.Batch, epoch: int, *, leaves: bool = False, wait_ms: int = 0, tries: int | None = None
    ) -> bool:
        """Write the progress of a batch. Returns False if another gateway runs it by now, or it has ended.

        leaves: this gateway stops running it, and another may claim it after `wait_ms`; 0: at once, after those first
        batches of tenants that wait already.
        tries: consecutive tries without a new answer; None: unchanged.
        """
        keys = self._keys
        call = lua.SaveBatch(
            batch=keys.batch(batch.id), open_batches=keys.open_batches, tenant_open=keys.open_batches_of(batch.tenant),
            id=batch.id, tenant=batch.tenant, epoch=epoch, record=m.encode(batch),
            outcome="1" if batch.status in m.ENDED_BATCH else "0" if leaves else "", status=batch.status,
            wait_ms=wait_ms, tries="" if tries is None else tries,
        )  # fmt: skip
        return bool(await self._scripts.run(call))

    # ------------------------------------------------------------ reading

    async def get(self, batch_id: str, tenant: str) -> m.Batch | None:
        """Return a tenant's batch; None if unknown, expired or of another tenant. Raises UnreadableRecord."""
        raw, cancel = await self._redis.hmget(self._keys.batch(batch_id), ("b", "cancel"))
        if not raw:
            return None
        try:
            batch = decode_record(raw, m.Batch)
        except UnreadableRecord:
            if await self.rank(tenant, batch_id) is None:
                return None
            raise
        return _shown(batch, cancel) if batch.tenant == tenant else None

    async def get_many(self, batch_ids: Sequence[str]) -> list[m.Batch]:
        """Return the readable ones of these batches in order, with `cancelling` as the status of cancelled ones."""
        pipe = self._redis.pipeline(transaction=False)
        for batch_id in batch_ids:
            pipe.hmget(self._keys.batch(batch_id), ("b", "cancel"))
        found = await pipe.execute()
        return [_shown(batch, cancel) for raw, cancel in found if raw for batch in readable([raw], m.Batch)]

    async def cancel(self, batch_id: str) -> None:
        """Request the cancellation of an existing batch."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.hsetnx(self._keys.batch(batch_id), "cancel", str(now_ms()))
        pipe.pexpire(self._keys.batch(batch_id), FORGOTTEN_MS, nx=True)  # it may have expired in between
        await pipe.execute()

    async def rank(self, tenant: str, batch_id: str) -> int | None:
        """Return how many of a tenant's batches are newer than this one; None if it is unknown."""
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
