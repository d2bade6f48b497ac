"""Who calls, and what they may. Without API keys everybody is one caller, who may everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.requests import Request

from protocol.queue.api_keys import SCOPES, Tenant
from protocol.queue.quota import Quota
from protocol.runtime.fleet_secret import owner_of
from protocol.wire import messages as m
from protocol.wire.errors import PermissionDenied

CALLER = "lorafleet.caller"
"""Key of a scope: its `Caller`."""

PUBLIC = "public"
"""Who jobs and idempotency keys belong to while there are no API keys: everybody."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request."""

    tenant: Tenant | None = None  # None: there are no keys
    scopes: Sequence[str] = SCOPES
    token: str = ""  # for the source of an adapter
    headers: dict[str, str] = field(default_factory=dict)  # what the answer tells of limits; filled on the way

    @property
    def owner(self) -> str:
        """Whose jobs, idempotency keys and prefix cache these are."""
        return self.tenant.name if self.tenant is not None else PUBLIC

    @property
    def name(self) -> str:
        """The tenant's name in the catalogue, "" for everybody."""
        return self.tenant.name if self.tenant is not None else ""

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes

    @property
    def names(self) -> frozenset[str]:
        """Whose names the caller sees in lists: everybody's, its tenant's, and what its token opened."""
        return frozenset(("", self.name, owner_of(self.token)))

    @property
    def quota(self) -> Quota | None:
        """Return what the tenant's use is held against, None without limits."""
        tenant = self.tenant
        if tenant is None or not tenant.is_limited:
            return None
        return Quota(tenant.name, tenant.requests_per_minute, tenant.tokens_per_minute, tenant.concurrency)

    def may_use(self, name: str) -> bool:
        """Tell whether everybody's adapter of this name is for this caller too."""
        return self.tenant is None or self.is_admin or self.tenant.sees(name)

    def sees(self, alias: m.Alias) -> bool:
        """Tell whether a name of the catalogue exists for this caller."""
        if alias.tenant:
            return alias.tenant in self.names
        return self.may_use(alias.name)

    def namespace(self, asked: str | None) -> str:
        """Return whose names an order is about: the tenant's own; an admin's may be anybody's, "" for everybody.

        Raises PermissionDenied.
        """
        if self.is_admin:
            return asked or ""
        if asked not in (None, self.name):
            raise PermissionDenied(f"only the scope admin may name a tenant, as {asked!r:.100} here")
        return self.name

    def require(self, scope: str) -> None:
        """Raise PermissionDenied unless the key has a scope, or is an admin's."""
        if scope not in self.scopes and not self.is_admin:
            raise PermissionDenied(
                f"this needs a key with the scope {scope}; the one given has {', '.join(self.scopes)}",
                code="insufficient_scope",
            )


EVERYBODY = Caller()


def caller_of(request: Request) -> Caller:
    """Return who sent a request."""
    return request.scope[CALLER]
