"""Authentication: a wrapper around the routes that finds the caller of a request by its API key, if keys are on.

With keys on, `Authorization: Bearer` is the key. The token for an adapter's source is then LoRAX's `api_token`; or the
key comes as `x-api-key`, and the bearer is the token as without keys.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.auth.callers import CALLER, NOBODY, Caller
from gateway.http.access import MATCH, Match
from gateway.http.errors import ShapeOf, unreachable_queue
from gateway.http.headers import header_of
from protocol.queue.books.api_keys import PREFIX, ApiKeys
from protocol.queue.bus import CONNECTION_ERRORS
from protocol.runtime.fleet_secret import FleetSecret
from protocol.wire.errors import LorafleetError, Unauthorized

HUB_TOKEN_PREFIX = "hf_"


class Authentication:
    """Puts the caller into a request's scope, or refuses the request with 401 or 403."""

    def __init__(
        self, app: ASGIApp, keys: ApiKeys | None, shape_of: ShapeOf, secret: FleetSecret | None = None
    ) -> None:
        """`keys`: None where the fleet asks for none. `shape_of`: how errors of a request are written.

        `secret`: the fleet's, None where it has none.
        """
        self._secret = secret
        self._app = app
        self._keys = keys
        self._shape_of = shape_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an authenticated request on."""
        if scope["type"] == "http":
            try:
                scope[CALLER] = await self._caller(scope[MATCH], scope["headers"])
            except CONNECTION_ERRORS as error:
                await self._shape_of(scope).response(unreachable_queue(error))(scope, receive, send)
                return
            except LorafleetError as error:
                headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
                await self._shape_of(scope).response(error, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _caller(self, match: Match, headers: Sequence[tuple[bytes, bytes]]) -> Caller:
        """Return who sent a request for a route. Raises Unauthorized and PermissionDenied."""
        bearer = _bearer(headers)
        if self._keys is None:
            return Caller(token=source_token(bearer, match), secret=self._secret)
        if match.scopes is None:
            return NOBODY
        given = header_of(headers, b"x-api-key") or ""
        key, token = (given, source_token(bearer, match)) if given else (bearer, "")
        if not key:
            raise Unauthorized("no API key was given: send `Authorization: Bearer KEY`, or `x-api-key: KEY`")
        found = await self._keys.find(key)
        if found is None:
            raise Unauthorized(f"the API key {_shown(key)} is unknown, expired or revoked")
        api_key, tenant = found
        caller = Caller(tenant, api_key.scopes, api_key.id, token, self._secret)
        caller.require(*match.scopes)
        return caller


def source_token(bearer: str, match: Match) -> str:
    """Return a bearer as the token for an adapter's source: any on LoRAX's routes, only Hub tokens on the others.

    An API key of this fleet is never such a token, so that no Hub is shown one.
    """
    if bearer.startswith(PREFIX):
        return ""
    return bearer if bearer.startswith(HUB_TOKEN_PREFIX) or match.any_token else ""


def _bearer(headers: Sequence[tuple[bytes, bytes]]) -> str:
    kind, _, value = (header_of(headers, b"authorization") or "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _shown(key: str) -> str:
    """Return a key shortened to what its owner recognizes."""
    return f"{key[:6]}…{key[-4:]}" if len(key) > 16 else "given"


def is_loopback(host: str) -> bool:
    """Return whether a listener on `host` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
