"""Authentication: a wrapper around the routes that finds the caller of a request by its API key, if keys are on.

With keys on, `Authorization: Bearer` is the key. The token for an adapter's source is then LoRAX's `api_token`; or the
key comes as `x-api-key`, and the bearer is the token as without keys.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.auth.callers import CALLER, EVERYBODY, Caller
from gateway.http.errors import ShapeOf, unreachable_queue
from gateway.http.headers import header_of
from gateway.http.paths import (
    AUDIT,
    CONSOLE,
    DEAD_LETTERS,
    DOCS,
    FLEET,
    KEYS,
    OLLAMA_PREFIX,
    PING,
    TENANTS,
    UPLOAD,
    WORKERS,
)
from protocol.queue.books.api_keys import PREFIX, ApiKeys
from protocol.queue.bus import CONNECTION_ERRORS
from protocol.runtime.fleet_secret import FleetSecret
from protocol.wire.errors import LorafleetError, Unauthorized

HUB_TOKEN_PREFIX = "hf_"

OPEN_PATHS = frozenset({"/", "/health", PING})
"""What probes read without a key."""

METRICS, API_PAGE = "/metrics", "/openapi.json"
"""What may be read without a key if the operator says so. With one, metrics need the scope `admin`: they are the whole
fleet's."""


OPERATOR_PATHS = tuple(f"{path}/" for path in (WORKERS, DEAD_LETTERS, KEYS, TENANTS, AUDIT))
"""They, and what is below them, need the scope `admin`."""


class Authentication:
    """Puts the caller into a request's scope, or refuses the request with 401 or 403."""

    def __init__(
        self, app: ASGIApp, keys: ApiKeys | None, shape_of: ShapeOf,
        secret: FleetSecret | None = None, *, open_pages: bool,
    ) -> None:  # fmt: skip
        """`keys`: None where the fleet asks for none. `shape_of`: how errors of a request are written.

        `secret`: the fleet's, None where it has none. `open_pages`: whether metrics and the API's page need no key.
        """
        self._secret = secret
        self._open_pages = open_pages
        self._open = OPEN_PATHS | {METRICS, API_PAGE, FLEET} if open_pages else OPEN_PATHS
        self._app = app
        self._keys = keys
        self._shape_of = shape_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an authenticated request on."""
        if scope["type"] == "http":
            path = scope["path"]
            try:
                scope[CALLER] = await self._caller(scope["method"], path, scope["headers"])
            except CONNECTION_ERRORS as error:
                await self._shape_of(scope).response(unreachable_queue(error))(scope, receive, send)
                return
            except LorafleetError as error:
                headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
                await self._shape_of(scope).response(error, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _caller(self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> Caller:
        """Return who sent a request. Raises Unauthorized and PermissionDenied."""
        bearer = _bearer(headers)
        if self._keys is None:
            return Caller(token=source_token(bearer, path), secret=self._secret)
        if path in self._open and (method in ("GET", "HEAD") or path == PING):
            return EVERYBODY
        if self._open_pages and f"{path}/".startswith(f"{DOCS}/") and method in ("GET", "HEAD"):
            return EVERYBODY
        if f"{path}/".startswith(f"{CONSOLE}/") and method in ("GET", "HEAD"):
            return EVERYBODY  # its files have no data: they ask for that with the operator's key
        given = header_of(headers, b"x-api-key") or ""
        key, token = (given, source_token(bearer, path)) if given else (bearer, "")
        if not key:
            raise Unauthorized("no API key was given: send `Authorization: Bearer KEY`, or `x-api-key: KEY`")
        found = await self._keys.find(key)
        if found is None:
            raise Unauthorized(f"the API key {_shown(key)} is not known here, has expired, or was revoked")
        api_key, tenant = found
        caller = Caller(tenant, api_key.scopes, api_key.id, token, self._secret)
        check_scopes(method, path, caller)
        return caller


def check_scopes(method: str, path: str, caller: Caller) -> None:
    """Raise PermissionDenied unless a caller's key has the scope that a route needs."""
    if path.startswith("/v1/adapters"):
        if method in ("GET", "HEAD"):
            if "adapters" not in caller.scopes:
                caller.require("infer")
        else:
            for_all = method == "POST" and (path == UPLOAD or path.endswith(("/pin", "/unpin", "/evict")))
            caller.require("admin" if for_all else "adapters")
    elif path in (METRICS, FLEET) or f"{path}/".startswith(OPERATOR_PATHS):
        caller.require("admin")
    elif path.removeprefix("/v1") in ("/load_lora_adapter", "/unload_lora_adapter"):
        caller.require("adapters")
    else:
        caller.require("infer")


def source_token(bearer: str, path: str) -> str:
    """Return a bearer as the token for an adapter's source: any on LoRAX's routes, only Hub tokens on the others.

    An API key of this fleet is never such a token, so that no Hub is shown one.
    """
    if bearer.startswith(PREFIX):
        return ""
    return bearer if bearer.startswith(HUB_TOKEN_PREFIX) or not path.startswith(("/v1/", OLLAMA_PREFIX)) else ""


def _bearer(headers: Sequence[tuple[bytes, bytes]]) -> str:
    kind, _, value = (header_of(headers, b"authorization") or "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _shown(key: str) -> str:
    """Return a key shortened to what its owner recognizes."""
    return f"{key[:6]}…{key[-4:]}" if len(key) > 16 else "given"


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
