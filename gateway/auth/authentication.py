"""Authentication: finds the caller of a request by its API key, if keys are on.

With keys on, `Authorization: Bearer` is the key, and an adapter source's token comes as LoRAX's `api_token`.
Alternatively the key comes as `x-api-key`, and the bearer is the token, as without keys.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from gateway.auth.callers import NOBODY, Caller
from gateway.http.access import RouteMatch
from gateway.http.errors import unreachable_queue
from gateway.http.headers import header_of
from protocol.queue.books.api_keys import PREFIX, ApiKeys
from protocol.queue.bus import CONNECTION_ERRORS
from protocol.runtime.fleet_secret import FleetSecret
from protocol.wire.errors import Unauthorized

HUB_TOKEN_PREFIX = "hf_"


class Authentication:
    """Authenticates requests."""

    def __init__(self, keys: ApiKeys | None, secret: FleetSecret | None = None) -> None:
        """keys: None if API keys are off. secret: the fleet's, None without one."""
        self._keys = keys
        self._secret = secret

    async def caller(self, match: RouteMatch, headers: Sequence[tuple[bytes, bytes]]) -> Caller:
        """Return the caller of a request for a route. Raises Unauthorized, PermissionDenied and Unavailable."""
        bearer = _bearer(headers)
        if self._keys is None:
            return Caller(token=source_token(bearer, match), secret=self._secret)
        if match.scopes is None:
            return NOBODY
        given = header_of(headers, b"x-api-key") or ""
        key, token = (given, source_token(bearer, match)) if given else (bearer, "")
        if not key:
            raise Unauthorized("no API key was given: send `Authorization: Bearer KEY`, or `x-api-key: KEY`")
        try:
            found = await self._keys.find(key)
        except CONNECTION_ERRORS as error:
            raise unreachable_queue(error) from error
        if found is None:
            raise Unauthorized(f"the API key {_shown(key)} is unknown, expired or revoked")
        api_key, tenant = found
        caller = Caller(tenant, api_key.scopes, api_key.id, token, self._secret)
        caller.require(*match.scopes)
        return caller


def source_token(bearer: str, match: RouteMatch) -> str:
    """Return the bearer if it may be an adapter source's token: any on LoRAX's routes, only Hub tokens elsewhere.

    An API key of this fleet is never used as one, so that it is not sent to a Hub.
    """
    if bearer.startswith(PREFIX):
        return ""
    return bearer if bearer.startswith(HUB_TOKEN_PREFIX) or match.any_token else ""


def _bearer(headers: Sequence[tuple[bytes, bytes]]) -> str:
    kind, _, value = (header_of(headers, b"authorization") or "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _shown(key: str) -> str:
    """Return a key shortened to a form that its owner recognizes."""
    return f"{key[:6]}…{key[-4:]}" if len(key) > 16 else "given"


def is_loopback(host: str) -> bool:
    """Return whether a listener on `host` can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
