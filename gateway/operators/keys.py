"""API keys and tenants over HTTP: operators may create, limit and revoke them, if the settings allow it.

Only the command line creates keys with the scope `admin`, so that a stolen one cannot create another.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import Field

from gateway.auth.callers import Caller
from gateway.bodies.parameter_check import JsonBody
from protocol.queue.books.api_keys import ApiKey, ApiKeys, Scope, Tenant
from protocol.queue.bus import QueueError, now_ms
from protocol.wire.errors import Conflict, NotFound, PermissionDenied

MAX_KEYS = 10_000
"""Maximum keys of a fleet for creating more here: a list reads all of them."""

MAX_LIFE_S = 10 * 365 * 86_400
MAX_LIMIT = 1 << 53

TenantName = Annotated[str, Field(min_length=1, max_length=64)]
Limit = Annotated[int, Field(ge=0, le=MAX_LIMIT)]


class KeyRequest(JsonBody):
    """`POST /v1/keys`."""

    OBJECT = "api_key"

    tenant: TenantName
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)] = Field(default=["infer"])
    expires_in_s: Annotated[int, Field(ge=0, le=MAX_LIFE_S)] = 0  # 0: never
    note: Annotated[str, Field(max_length=200)] = ""


class TenantChange(JsonBody):
    """`POST /v1/tenants/{name}`: omitted fields are unchanged."""

    OBJECT = "tenant"

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrency: Limit | None = None
    kept_bytes: Limit | None = None
    weight: Annotated[float, Field(gt=0, le=1000)] | None = None
    adapters: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100)] | None = None


class KeyAdministration:
    """Reads and changes keys and tenants in the queue."""

    def __init__(self, keys: ApiKeys | None, *, writes: bool) -> None:
        """keys: None if API keys are off. writes: whether keys may be created, limited and revoked here."""
        self._keys = keys
        self._writes = writes

    async def list(self, after: str, limit: int, tenant: str | None) -> dict[str, Any]:
        """Return a page of keys, by tenant and age, without secrets. Raises Conflict while keys are off, NotFound."""
        found = [key for key, _ in await self._known().all() if tenant in (None, key.tenant)]
        return _page([_key(key) for key in found], after, limit, writable=self._writes)

    async def create(self, body: KeyRequest, caller: Caller) -> dict[str, Any]:
        """Create a key and return it with its secret, which is never shown again. Raises PermissionDenied, Conflict."""
        keys = self._writable(caller)
        if "admin" in body.scopes:
            raise PermissionDenied(
                "keys with the scope admin can only be created by `lorafleet keys create`",
                param="scopes",
                code="admin_keys_by_command",
            )
        if await keys.count() >= MAX_KEYS:
            raise Conflict(f"the fleet has {MAX_KEYS} keys, which is the limit: revoke some", code="too_many_keys")
        expires_ms = now_ms() + body.expires_in_s * 1000 if body.expires_in_s else 0
        try:
            secret, key = await keys.create(body.tenant, body.scopes, expires_ms, body.note)
        except QueueError as error:
            raise _not_allowed(error) from error
        return {**_key(key), "secret": secret}

    async def revoke(self, key_id: str, caller: Caller) -> dict[str, Any]:
        """Delete a key. Raises PermissionDenied, NotFound."""
        try:
            key = await self._writable(caller).revoke(key_id)
        except QueueError as error:
            raise _not_allowed(error) from error
        return {"id": key.id, "object": "api_key", "deleted": True}

    async def tenants(self, after: str, limit: int) -> dict[str, Any]:
        """Return a page of the tenants with keys or limits. Raises Conflict while keys are off, NotFound."""
        return _page([_tenant(one) for one in await self._known().tenants()], after, limit, writable=self._writes)

    async def change(self, name: str, body: TenantChange, caller: Caller) -> dict[str, Any]:
        """Set a tenant's limits. Raises PermissionDenied, BadRequest."""
        keys = self._writable(caller)
        changes = {key: value for key, value in body.model_dump(exclude_none=True).items() if key in _TENANT_FIELDS}
        if "adapters" in changes:
            changes["adapters"] = tuple(changes["adapters"])
        tenant = msgspec.structs.replace(await keys.tenant(name), **changes)
        try:
            await keys.set_tenant(tenant)
        except QueueError as error:
            raise _not_allowed(error) from error
        return _tenant(tenant)

    def _known(self) -> ApiKeys:
        if self._keys is None:
            raise Conflict("API keys are off here: --api-keys turns them on", code="api_keys_off")
        return self._keys

    def _writable(self, caller: Caller) -> ApiKeys:
        caller.require("admin")
        keys = self._known()
        if not self._writes:
            raise PermissionDenied(
                "keys and limits can only be changed by `lorafleet keys` here; the setting console_keys allows it over"
                " HTTP too",
                code="keys_by_command",
            )
        return keys


_TENANT_FIELDS = frozenset(field.name for field in msgspec.structs.fields(Tenant)) - {"name"}


def _not_allowed(error: QueueError) -> PermissionDenied:
    return PermissionDenied(
        f"the queue does not let this gateway write keys ({error}): create the queue's users with --console-keys",
        code="keys_by_command",
    )


def _key(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "api_key",
        "tenant": key.tenant,
        "scopes": key.scopes,
        "created_ms": key.created_ms,
        "expires_ms": key.expires_ms or None,
        "expired": bool(key.expires_ms and key.expires_ms <= now_ms()),
        "note": key.note,
    }


def _tenant(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.name,
        "object": "tenant",
        "requests_per_minute": tenant.requests_per_minute,
        "tokens_per_minute": tenant.tokens_per_minute,
        "concurrency": tenant.concurrency,
        "kept_bytes": tenant.kept_bytes,
        "weight": tenant.weight,
        "adapters": list(tenant.adapters),
    }


def _page(data: list[dict[str, Any]], after: str, limit: int, *, writable: bool) -> dict[str, Any]:
    """Return a page of a list after an object's id. writable: objects can be changed here. Raises NotFound."""
    start = 0
    if after:
        start = next((number for number, one in enumerate(data, 1) if one["id"] == after), 0)
        if not start:
            raise NotFound(f"there is no {after:.100}", param="after")
    page = data[start : start + limit]
    last = page[-1]["id"] if page else None
    more = start + len(page) < len(data)
    return {"object": "list", "data": page, "has_more": more, "last_id": last, "writable": writable}
