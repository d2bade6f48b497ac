"""API keys and their tenants. Redis holds only the hashes of keys; a tenant's limits are a record of their own.

There is no cache: every request reads both records, so a revoked key or a changed limit takes effect with the next
request at every gateway.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from protocol.queue.connection.redis_client import Client
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.codec import decode
from protocol.wire.errors import BadRequest, NotFound
from protocol.wire.keys import Keys

PREFIX = "sk-lf-"
"""Prefix of every key: it distinguishes keys from tokens for adapter sources, and identifies leaked keys."""

Scope = Literal["infer", "adapters", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

RESERVED = ("public",)
"""Owners of objects created while API keys are off."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NUM_SECRET_BYTES = 32


class Tenant(m.Wire, frozen=True):
    """A tenant and its limits, which apply to all its keys together. 0: no limit, unless stated otherwise."""

    name: str
    requests_per_minute: int = 0  # HTTP calls
    tokens_per_minute: int = 0  # limit on prompt and output tokens
    concurrency: int = 0  # choices queued or running at once
    kept_bytes: int = 0  # limit on bytes in the queue; 0: the setting `tenant_bytes`
    weight: float = 1.0  # its share relative to other tenants
    adapters: tuple[str, ...] = ("*",)  # patterns for the names of shared adapters that it may use

    def sees(self, name: str) -> bool:
        """Return whether the tenant may use the shared adapter of this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


class ApiKey(m.Wire, frozen=True):
    """The record of a key, without the key itself."""

    id: str  # identifies the key, but reveals nothing of it
    tenant: str
    scopes: list[str]
    created_ms: int
    expires_ms: int = 0  # 0: never
    note: str = ""


def hash_of(key: str) -> str:
    """Return the stored hash of a key. A key has 256 random bits, so neither salt nor many rounds are needed."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The keys and tenants of a fleet."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._redis = client
        self._keys = keys

    # ------------------------------------------------------------ reading

    async def find(self, key: str) -> tuple[ApiKey, Tenant] | None:
        """Return a key's record and tenant; None if the key is unknown or has expired."""
        raw = await self._redis.hget(self._keys.api_keys, hash_of(key))
        if raw is None:
            return None
        found = decode(raw, ApiKey)
        if found.expires_ms and found.expires_ms <= now_ms():
            return None
        return found, await self.tenant(found.tenant)

    async def tenant(self, name: str) -> Tenant:
        """Return a tenant's record; one without a record has no limits."""
        raw = await self._redis.hget(self._keys.tenants, name)
        return decode(raw, Tenant) if raw is not None else Tenant(name=name)

    async def all(self) -> list[tuple[ApiKey, Tenant]]:
        """Return every key with its tenant, including expired keys, ordered by tenant and age."""
        raws = await self._redis.hvals(self._keys.api_keys)
        found = sorted((decode(raw, ApiKey) for raw in raws), key=lambda key: (key.tenant, key.created_ms))
        tenants = {name: await self.tenant(name) for name in {key.tenant for key in found}}
        return [(key, tenants[key.tenant]) for key in found]

    async def tenants(self) -> list[Tenant]:
        """Return every tenant that has limits or keys, ordered by name."""
        found = [decode(raw, Tenant) for raw in await self._redis.hvals(self._keys.tenants)]
        known = {tenant.name: tenant for tenant in found}
        for raw in await self._redis.hvals(self._keys.api_keys):
            name = decode(raw, ApiKey).tenant
            known.setdefault(name, Tenant(name=name))
        return [known[name] for name in sorted(known)]

    async def count(self) -> int:
        """Return the number of keys."""
        return int(await self._redis.hlen(self._keys.api_keys))

    # ------------------------------------------------------------ changing

    async def create(
        self, tenant: str, scopes: Sequence[str], expires_ms: int = 0, note: str = ""
    ) -> tuple[str, ApiKey]:
        """Create a key; return it, which cannot be read again later, with its record. Raises BadRequest."""
        check_tenant(tenant)
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise BadRequest(f"{', '.join(unknown) or 'none'} are not valid scopes; these are {', '.join(SCOPES)}")
        secret = PREFIX + secrets.token_urlsafe(_NUM_SECRET_BYTES)
        key = ApiKey(
            id=f"key_{secrets.token_hex(6)}",
            tenant=tenant,
            scopes=list(dict.fromkeys(scopes)),
            created_ms=now_ms(),
            expires_ms=expires_ms,
            note=note,
        )
        await self._redis.hset(self._keys.api_keys, hash_of(secret), m.encode(key))
        return secret, key

    async def revoke(self, key_id: str) -> ApiKey:
        """Delete a key by its id; return its record. Raises NotFound."""
        for field, raw in (await self._redis.hgetall(self._keys.api_keys)).items():
            key = decode(raw, ApiKey)
            if key.id == key_id:
                await self._redis.hdel(self._keys.api_keys, field)
                return key
        raise NotFound(f"there is no key {key_id}")

    async def set_tenant(self, tenant: Tenant) -> None:
        """Store a tenant and its limits. Raises BadRequest."""
        check_tenant(tenant.name)
        limits = (tenant.requests_per_minute, tenant.tokens_per_minute, tenant.concurrency, tenant.kept_bytes)
        if min(limits) < 0 or not 0 < tenant.weight <= 1000:
            raise BadRequest("limits must not be negative, and a weight above 0 and at most 1000")
        await self._redis.hset(self._keys.tenants, tenant.name, m.encode(tenant))


def check_tenant(name: str) -> None:
    """Raise BadRequest unless `name` can be a tenant's name."""
    if not _TENANT.fullmatch(name) or name in RESERVED:
        raise BadRequest(
            f"{name!r:.100} cannot be a tenant's name: at most 64 letters, digits, dots, dashes and underscores"
        )
