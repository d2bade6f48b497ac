"""What tenants have used, by day: the scripts that end requests count it (`count_usage` of `lua/common.lua`).

A tenant's day is a hash with a row for each model that answered it. As a row is written with the end of its request, or
not at all, each request counts once, whatever dies and however often it was run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from protocol.metrics.series import UNREADABLE
from protocol.queue import signatures as lua
from protocol.queue.connection.redis_client import Client
from protocol.queue.scripts import Scripts
from protocol.runtime.guarded import FAILED
from protocol.wire.clock import now_ms
from protocol.wire.codec import MALFORMED
from protocol.wire.keys import Keys

DAY_S = 86_400
MAX_NAME = 128
"""Longest name of a model in a row, in characters; longer ones are cut, and distinguished by their digests."""

MAX_RESIDENT = 4096
"""Maximum number of adapters per day with residency of their own."""

OTHERS = "other"
"""Stands for the models and adapters that came after too many others on one day."""


@dataclass(frozen=True, slots=True)
class CountedFor:
    """For what a request counts."""

    tenant: str
    model: str  # name shown by the API
    digest: str  # digest of the adapter; "" for the base model, and for merges
    base: str
    batch: bool  # it is the line of a batch
    days: int  # retention in days


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What a tenant has used of one model on one day. All are empty of what came after too many other rows."""

    tenant: str
    model: str
    digest: str
    base: str
    batch: bool
    requests: int  # calls: the choices of one count once
    prompt_tokens: int  # a prompt with several choices counts once
    cached_tokens: int  # tokens among them found in the prefix cache
    output_tokens: int


def usage_of(counted: CountedFor, *, calls: int, prompt_tokens: int, has_output: bool) -> bytes:
    """Return what a request adds to its tenant's usage when it ends, as `Bus.submit` takes it.

    calls, prompt_tokens: 0 for a choice after the first. has_output: whether its log holds tokens that its client asked
    for.
    """
    row = msgspec.json.encode([counted.model[:MAX_NAME], counted.digest, counted.base[:MAX_NAME], int(counted.batch)])
    parts = [calls, prompt_tokens, 0 if has_output else -1, counted.days, counted.tenant, row.decode()]
    return msgspec.msgpack.encode(parts)


def row_of(usage: bytes) -> str:
    """Return the row of what `usage_of` returned, as a history keeps it; "" of nothing."""
    return msgspec.msgpack.decode(usage)[-1] if usage else ""


def model_of(usage: bytes) -> str:
    """Return the model of what `usage_of` returned, as the API shows it; "" of nothing."""
    return msgspec.json.decode(row_of(usage))[0] if usage else ""


def base_of(usage: bytes) -> str:
    """Return the name of the base of what `usage_of` returned; "" of nothing."""
    return msgspec.json.decode(row_of(usage))[2] if usage else ""


def owner_of(usage: bytes) -> str:
    """Return the tenant of what `usage_of` returned, as the API shows it; "" of nothing."""
    return msgspec.msgpack.decode(usage)[-2] if usage else ""


class UsageBook:
    """The books of the fleet."""

    def __init__(self, redis: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = scripts

    async def tenants(self, day: int) -> list[str]:
        """Return the tenants that have used anything on a day, by name."""
        return sorted(name.decode() for name in await self._redis.smembers(self._keys.usage_tenants(day)))

    async def rows(self, day: int, tenant: str) -> list[UsageRow]:
        """Return what a tenant has used on a day: at most 1,001 rows."""
        found = await self._redis.hgetall(self._keys.usage(day, tenant))
        rows: list[UsageRow] = []
        for raw, values in sorted(found.items()):
            try:
                rows.append(_row(tenant, raw, values))
            except (ValueError, TypeError, *MALFORMED) as error:  # it must not hide the others
                UNREADABLE.labels(UsageRow.__name__).inc()
                FAILED.note("records", error, f"a row of the usage of {tenant}")
        return rows

    async def note_residency(self, ms_by_digest: Mapping[str, int], days: int) -> None:
        """Add to today's time for which adapters were in a pool. Repeated after a lost reply, it counts twice.

        days: that it is kept. After `MAX_RESIDENT` adapters all others count as `OTHERS`.
        """
        call = lua.NoteResidency(
            residency=self._keys.residency(now_ms() // (DAY_S * 1000)),
            max_digests=MAX_RESIDENT,
            others=OTHERS,
            ttl_s=(days + 1) * DAY_S,
            times=[lua.ResidencyRow(digest=digest, ms=ms) for digest, ms in ms_by_digest.items()],
        )
        await self._scripts.run(call)

    async def residency(self, day: int) -> dict[str, float]:
        """Return for how many seconds adapters were in pools on a day, by digest, or `OTHERS`; all workers together."""
        found = await self._redis.hgetall(self._keys.residency(day))
        return {digest.decode(): int(ms) / 1000 for digest, ms in found.items()}


def _row(tenant: str, raw: bytes, values: bytes) -> UsageRow:
    names: Sequence[str | int] = msgspec.json.decode(raw)
    model, digest, base, batch = names or ("", "", "", 0)
    requests, prompt, cached, output = (values or b"0 0 0 0").split()
    return UsageRow(
        tenant, str(model), str(digest), str(base), bool(batch), int(requests), int(prompt), int(cached), int(output)
    )
