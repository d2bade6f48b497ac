"""The records of background jobs: one hash per job, and an index per tenant by creation time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.queue import signatures as lua
from protocol.queue.connection.redis_client import Client
from protocol.queue.kept.readable import readable
from protocol.queue.scripts import Scripts
from protocol.runtime.sealing import Seal
from protocol.wire import messages as m
from protocol.wire.codec import decode_record
from protocol.wire.errors import Unavailable
from protocol.wire.keys import Keys


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as `Bus.submit` writes it, together with its requests."""

    job: m.Job
    request: bytes  # the fields of the HTTP body that are needed to write the answer, as JSON
    ttl_ms: int


class StoredJobs:
    """The jobs of a fleet, by id."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts, seal: Seal | None = None) -> None:
        self._seal = seal
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    async def get(self, jid: str) -> m.Job | None:
        """Return a job, None if it is unknown or has expired. Raises UnreadableRecord."""
        raw = await self._redis.hget(self._keys.job(jid), "b")
        return decode_record(raw, m.Job) if raw else None

    async def get_many(self, jids: Sequence[str], *, leave_newer: bool = False) -> list[m.Job]:
        """Return the known and readable ones of these jobs, in order. leave_newer: see `readable`."""
        pipe = self._redis.pipeline(transaction=False)
        for jid in jids:
            pipe.hget(self._keys.job(jid), "b")
        return readable(await pipe.execute(), m.Job, leave_newer=leave_newer)

    async def request(self, jid: str) -> bytes | None:
        """Return the kept fields of a job's HTTP body, as JSON; None if the job is unknown or has expired.

        Raises ProtocolError if they cannot be decrypted.
        """
        found = await self._redis.hget(self._keys.job(jid), "request")
        return (
            found if found is None or self._seal is None else self._seal.open(found, f"{self._keys.job(jid)}/request")
        )

    def kept(self, new: NewJob) -> bytes:
        """Return the value that `request` decrypts: sealed if there is a seal."""
        if self._seal is None:
            return new.request
        return self._seal.seal(new.request, f"{self._keys.job(new.job.jid)}/request")

    async def forget(self, job: m.Job, text_ms: int = 0) -> bool:
        """Delete a job and everything stored about its ended requests. Returns False if the job is unknown.

        text_ms: how long the history's database may have their texts, including texts of requests that have expired in
        the queue; 0: it has none. Raises Unavailable while too many deletions wait for that database.
        """
        keys = self._keys
        idem = keys.idem(job.tenant, job.key) if job.key else ""
        call = lua.Forget(
            job=keys.job(job.jid), jobs=keys.jobs(job.tenant), idem=idem, jid=job.jid, tenant=job.tenant,
            text_ms=text_ms, rids=job.rids,
        )  # fmt: skip
        found = await self._scripts.run(call)
        if found < 0:
            raise Unavailable(
                "too many deletions wait for the history's database; try again later", code="history_full"
            )
        return bool(found)

    async def rank(self, tenant: str, jid: str) -> int | None:
        """Return how many of a tenant's jobs are newer than this one; None if it is unknown."""
        return await self._redis.zrevrank(self._keys.jobs(tenant), jid)

    async def newest(self, tenant: str, start: int, num: int) -> list[str]:
        """Return the ids of a tenant's jobs `[start, start + num)`, newest first."""
        found = await self._redis.zrevrange(self._keys.jobs(tenant), start, start + num - 1)
        return [jid.decode() for jid in found]
