"""The caller of a request and its permissions. Without API keys there is one caller with all permissions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.requests import Request

from protocol.queue.books.api_keys import SCOPES, Tenant
from protocol.queue.books.quota import Quota
from protocol.runtime.fleet_secret import FleetSecret, owner_of
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import PermissionDenied

CALLER = "lorafleet.caller"
"""ASGI scope key of a request's `Caller`."""

PUBLIC = "public"
"""Owner of jobs, idempotency keys and conversations if there are no API keys."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request."""

    tenant: Tenant | None = None  # None: there are no keys
    scopes: Sequence[str] = SCOPES
    key_id: str = ""  # id of the API key; "" without keys
    token: str = field(default="", repr=False)  # access token for the source of an adapter
    secret: FleetSecret | None = field(default=None, repr=False)  # the fleet's secret, with which tokens are hashed
    headers: dict[str, str] = field(default_factory=dict)  # response headers about limits; set on submission
    until_ms: int = 0  # unix ms of the deadline of a batch's calls; 0: not a batch

    @property
    def owner(self) -> str:
        """Owner of the caller's jobs and idempotency keys."""
        return self.tenant.name if self.tenant is not None else PUBLIC

    @property
    def name(self) -> str:
        """The tenant's name, "" without keys; it selects adapter names and prefix cache."""
        return self.tenant.name if self.tenant is not None else ""

    @property
    def is_batch(self) -> bool:
        """Whether its calls are lines of a batch."""
        return self.until_ms > 0

    @property
    def is_admin(self) -> bool:
        """Whether its key has the scope `admin`."""
        return "admin" in self.scopes

    @property
    def token_owner(self) -> str:
        """Owner of adapter names that were registered with its source token, "" without a token."""
        return owner_of(self.token, self.secret)

    @property
    def names(self) -> frozenset[str]:
        """Owners of the adapter names that the caller sees: "" (shared), its tenant, and its source token's owner."""
        return frozenset(("", self.name, self.token_owner))

    @property
    def quota(self) -> Quota | None:
        """The tenant's limits, None without keys."""
        tenant = self.tenant
        if tenant is None:
            return None
        if self.is_batch:  # batch work runs on idle capacity, and is exempt from the tenant's rates
            return Quota(tenant.name, 0, 0, 0, tenant.kept_bytes)
        limits = (tenant.requests_per_minute, tenant.tokens_per_minute, tenant.concurrency, tenant.kept_bytes)
        return Quota(tenant.name, *limits)

    def may_use(self, name: str) -> bool:
        """Return whether the caller may use the shared adapter of a name."""
        return self.tenant is None or self.is_admin or self.tenant.sees(name)

    def sees(self, alias: m.Alias) -> bool:
        """Return whether an alias exists for this caller."""
        if alias.tenant:
            return alias.tenant == self.name or alias.tenant == self.token_owner
        return self.may_use(alias.name)

    def namespace(self, asked: str | None) -> str:
        """Return the owner of the names that an operation concerns: the tenant, or for an admin `asked`; "" is shared.

        Raises PermissionDenied for another tenant.
        """
        if self.is_admin:
            return asked or ""
        if asked not in (None, self.name):
            raise PermissionDenied(f"only keys with the scope admin may name a tenant: {brief(asked)}")
        return self.name

    def require(self, *scopes: str) -> None:
        """Raise PermissionDenied unless the key has one of these scopes or `admin`.

        Without arguments, any key suffices.
        """
        if scopes and not self.is_admin and not any(scope in self.scopes for scope in scopes):
            raise PermissionDenied(
                f"this needs a key with the scope {' or '.join(scopes)}; the one given has {', '.join(self.scopes)}",
                code="insufficient_scope",
            )

    def require_names_of(self, tenant: str) -> None:
        """Raise PermissionDenied unless the caller may change the adapters of a tenant; "" for shared ones."""
        self.require("adapters")
        if tenant != self.name:
            self.require("admin")


EVERYBODY = Caller()

NOBODY = Caller(scopes=())
"""The caller of requests without a key to routes that need none, if API keys are on."""


def caller_of(request: Request) -> Caller:
    """Return the caller of a request."""
    return request.scope[CALLER]
