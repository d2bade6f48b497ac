"""The records of background jobs: one message each, and an index per tenant by creation time."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.queue.redis_client import Client, read_many
from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.keys import Keys


class Jobs:
    """The jobs of a fleet, by id."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._redis = client
        self._keys = keys

    async def save(self, job: m.Job, ttl_ms: int) -> None:
        """Keep a job for `ttl_ms`, and drop older ones from its tenant's index."""
        index = self._keys.jobs(job.tenant)
        pipe = self._redis.pipeline(transaction=True)
        pipe.set(self._keys.job(job.jid), m.encode(job), px=ttl_ms)
        pipe.zadd(index, {job.jid: job.created_ms})
        pipe.zremrangebyscore(index, "-inf", job.created_ms - ttl_ms)
        pipe.pexpire(index, ttl_ms)
        await pipe.execute()

    async def forget(self, job: m.Job) -> None:
        """Delete a job that came to nothing."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.delete(self._keys.job(job.jid))
        pipe.zrem(self._keys.jobs(job.tenant), job.jid)
        await pipe.execute()

    async def exists(self, jid: str) -> bool:
        """Return whether a job is known."""
        return bool(await self._redis.exists(self._keys.job(jid)))

    async def get(self, jid: str) -> m.Job | None:
        """Return a job, None if it is unknown or has expired."""
        found = await self.get_many([jid])
        return found[0] if found else None

    async def get_many(self, jids: Sequence[str]) -> list[m.Job]:
        """Return those of these jobs that are known, in their order."""
        raws = await read_many(self._redis, [self._keys.job(jid) for jid in jids])
        return [decode(raw, m.Job) for raw in raws if raw]

    async def rank(self, tenant: str, jid: str) -> int | None:
        """Return how many of a tenant's jobs are newer than one; None when it is unknown."""
        return await self._redis.zrevrank(self._keys.jobs(tenant), jid)

    async def newest(self, tenant: str, start: int, num: int) -> list[str]:
        """Return the ids of a tenant's jobs `[start, start + num)`, newest first."""
        found = await self._redis.zrevrange(self._keys.jobs(tenant), start, start + num - 1)
        return [jid.decode() for jid in found]
