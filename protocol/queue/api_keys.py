"""API keys and the tenants they belong to. Redis holds only a key's hash; what a tenant may is one record of its own.

There is no cache: every request looks, so a key that is revoked or a limit that is changed counts from the next one on,
at every gateway.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from protocol.queue.bus import Bus, decode, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, NotFound

PREFIX = "sk-lf-"
"""How every key begins: whoever finds one knows what it is, and it is not taken for a token of an adapter's source."""

Scope = Literal["infer", "adapters", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

RESERVED = ("public",)
"""Who owns what is made while keys are off."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NUM_SECRET_BYTES = 32


class Tenant(m.Wire, frozen=True):
    """What a tenant may, all its keys together. 0: no limit."""

    name: str
    requests_per_minute: int = 0  # HTTP calls
    tokens_per_minute: int = 0  # of prompts and outputs
    concurrency: int = 0  # choices queued or running at once
    weight: float = 1.0  # its share relative to others
    adapters: tuple[str, ...] = ("*",)  # patterns of the names of everybody's adapters that it sees

    @property
    def is_limited(self) -> bool:
        """Whether anything of its use is counted."""
        return bool(self.requests_per_minute or self.tokens_per_minute or self.concurrency)

    def sees(self, name: str) -> bool:
        """Tell whether it may use everybody's adapter of this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


class ApiKey(m.Wire, frozen=True):
    """What is known of a key."""

    id: str  # names it; gives nothing of it away
    tenant: str
    scopes: list[str]
    created_ms: int
    expires_ms: int = 0  # 0: never
    note: str = ""


def hash_of(key: str) -> str:
    """Return what is kept of a key. It has 256 random bits: there is nothing to guess, so no salt, and one round."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The keys and tenants of a fleet."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    # ------------------------------------------------------------ asking

    async def find(self, key: str) -> tuple[ApiKey, Tenant] | None:
        """Return a key that is good now, and its tenant; None for any other."""
        keys = self._bus.keys
        raw = await self._bus.redis.hget(keys.api_keys, hash_of(key))
        if raw is None:
            return None
        found = decode(raw, ApiKey)
        if found.expires_ms and found.expires_ms <= now_ms():
            return None
        return found, await self.tenant(found.tenant)

    async def tenant(self, name: str) -> Tenant:
        """Return a tenant; one that was never limited may everything."""
        raw = await self._bus.redis.hget(self._bus.keys.tenants, name)
        return decode(raw, Tenant) if raw is not None else Tenant(name=name)

    async def all(self) -> list[tuple[ApiKey, Tenant]]:
        """Return every key, expired ones too, by tenant and age."""
        raws = await self._bus.redis.hvals(self._bus.keys.api_keys)
        found = sorted((decode(raw, ApiKey) for raw in raws), key=lambda key: (key.tenant, key.created_ms))
        tenants = {name: await self.tenant(name) for name in {key.tenant for key in found}}
        return [(key, tenants[key.tenant]) for key in found]

    # ------------------------------------------------------------ changing

    async def create(
        self, tenant: str, scopes: Sequence[str], expires_ms: int = 0, note: str = ""
    ) -> tuple[str, ApiKey]:
        """Make a key; return it, for the only time, and what is known of it. Raises BadRequest."""
        check_tenant(tenant)
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise BadRequest(f"{', '.join(unknown) or 'none'} cannot be a key's scopes, which are {', '.join(SCOPES)}")
        secret = PREFIX + secrets.token_urlsafe(_NUM_SECRET_BYTES)
        key = ApiKey(
            id=f"key_{secrets.token_hex(6)}", tenant=tenant, scopes=list(dict.fromkeys(scopes)), created_ms=now_ms(),
            expires_ms=expires_ms, note=note,
        )  # fmt: skip
        await self._bus.redis.hset(self._bus.keys.api_keys, hash_of(secret), m.encode(key))
        return secret, key

    async def revoke(self, key_id: str) -> ApiKey:
        """Forget a key. Raises NotFound."""
        for field, raw in (await self._bus.redis.hgetall(self._bus.keys.api_keys)).items():
            key = decode(raw, ApiKey)
            if key.id == key_id:
                await self._bus.redis.hdel(self._bus.keys.api_keys, field)
                return key
        raise NotFound(f"there is no key {key_id}")

    async def set_tenant(self, tenant: Tenant) -> None:
        """Write down what a tenant may. Raises BadRequest."""
        check_tenant(tenant.name)
        limits = (tenant.requests_per_minute, tenant.tokens_per_minute, tenant.concurrency)
        if min(limits) < 0 or not 0 < tenant.weight <= 1000:
            raise BadRequest("limits must not be negative, and a weight above 0 and at most 1000")
        await self._bus.redis.hset(self._bus.keys.tenants, tenant.name, m.encode(tenant))


def check_tenant(name: str) -> None:
    """Raise BadRequest for what cannot be a tenant's name."""
    if not _TENANT.fullmatch(name) or name in RESERVED:
        raise BadRequest(
            f"{name!r:.100} cannot be a tenant's name: at most 64 letters, digits, dots, dashes and underscores"
        )
