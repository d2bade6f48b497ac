"""The usage of tenants by day, counted by the scripts that end requests (`count_usage` of `lua/common.lua`).

A tenant's day is a hash with one row per model. A row is written by the script that writes the end of the request. So
each request counts once, however often it was run and whatever process dies.
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
"""Maximum characters of a model's name in a row; longer names are cut and still distinguished by their digests."""

MAX_RESIDENT = 4096
"""Maximum number of adapters per day whose residency is counted separately."""

OTHERS = "other"
"""Stands for the models and adapters beyond a day's maximum number."""


@dataclass(frozen=True, slots=True)
class CountedFor:
    """The names under which a request is counted."""

    tenant: str
    model: str  # name shown by the API
    digest: str  # digest of the adapter; "" for the base model, and for merges
    base: str
    batch: bool  # whether it is the line of a batch
    days: int  # retention in days


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A tenant's usage of one model on one day. The names are empty in the row for all usage beyond the maximum."""

    tenant: str
    model: str
    digest: str
    base: str
    batch: bool
    requests: int  # number of calls: the choices of one call count once
    prompt_tokens: int  # a prompt with several choices counts once
    cached_tokens: int  # those of `prompt_tokens` found in the prefix cache
    output_tokens: int


def usage_of(counted: CountedFor, *, calls: int, prompt_tokens: int, has_output: bool) -> bytes:
    """Return what a request adds to its tenant's usage when it ends, in the form that `Bus.submit` takes.

    calls, prompt_tokens: 0 for a choice after the first. has_output: whether its log contains tokens that the client
    has asked for.
    """
    row = msgspec.json.encode([counted.model[:MAX_NAME], counted.digest, counted.base[:MAX_NAME], int(counted.batch)])
    parts = [calls, prompt_tokens, 0 if has_output else -1, counted.days, counted.tenant, row.decode()]
    return msgspec.msgpack.encode(parts)


def row_of(usage: bytes) -> str:
    """Return the row in `usage`, a result of `usage_of`, as the history keeps it; "" for no usage."""
    return msgspec.msgpack.decode(usage)[-1] if usage else ""


def model_of(usage: bytes) -> str:
    """Return the model in `usage`, a result of `usage_of`, as the API shows it; "" for no usage."""
    return msgspec.json.decode(row_of(usage))[0] if usage else ""


def base_of(usage: bytes) -> str:
    """Return the base's name in `usage`, a result of `usage_of`; "" for no usage."""
    return msgspec.json.decode(row_of(usage))[2] if usage else ""


def owner_of(usage: bytes) -> str:
    """Return the tenant in `usage`, a result of `usage_of`, as the API shows it; "" for no usage."""
    return msgspec.msgpack.decode(usage)[-2] if usage else ""


class UsageBook:
    """Reads usage, and records residency."""

    def __init__(self, redis: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = scripts

    async def tenants(self, day: int) -> list[str]:
        """Return the tenants with any usage on a day, ordered by name. day: days since 1970-01-01 UTC."""
        return sorted(name.decode() for name in await self._redis.smembers(self._keys.usage_tenants(day)))

    async def rows(self, day: int, tenant: str) -> list[UsageRow]:
        """Return a tenant's usage on a day: at most 1,001 rows, without unreadable ones."""
        found = await self._redis.hgetall(self._keys.usage(day, tenant))
        rows: list[UsageRow] = []
        for raw, values in sorted(found.items()):
            try:
                rows.append(_row(tenant, raw, values))
            except (ValueError, TypeError, *MALFORMED) as error:  # one bad row must not hide the others
                UNREADABLE.labels(UsageRow.__name__).inc()
                FAILED.note("records", error, f"a row of the usage of {tenant}")
        return rows

    async def note_residency(self, ms_by_digest: Mapping[str, int], days: int) -> None:
        """Add to the ms for which adapters were resident today. A repetition after a lost reply counts twice.

        days: retention in days. Beyond `MAX_RESIDENT` adapters, all others are counted as `OTHERS`.
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
        """Return digest, or `OTHERS`, -> seconds for which it was resident on a day, summed over all workers."""
        found = await self._redis.hgetall(self._keys.residency(day))
        return {digest.decode(): int(ms) / 1000 for digest, ms in found.items()}


def _row(tenant: str, raw: bytes, values: bytes) -> UsageRow:
    names: Sequence[str | int] = msgspec.json.decode(raw)
    model, digest, base, batch = names or ("", "", "", 0)
    requests, prompt, cached, output = (values or b"0 0 0 0").split()
    return UsageRow(
        tenant, str(model), str(digest), str(base), bool(batch), int(requests), int(prompt), int(cached), int(output)
    )
