"""What web pages may ask of a gateway without API keys: nothing, unless the operator allows their origin.

A browser sends requests for any page that it shows, to this machine too. Two things tell such requests apart. `Origin`
and `Sec-Fetch-Site` say that a page of another site asks. And a page whose own name was made to point here (DNS
rebinding) has that name in `Host`. Clients that are no browsers send neither header, and see nothing of this.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.auth.authentication import is_loopback
from gateway.http.errors import ShapeOf
from protocol.runtime.settings import Settings, names_of
from protocol.wire.errors import PermissionDenied

PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".svc.cluster.local", ".test")
"""Ends of names that nobody can register, so that no page of a stranger can have them."""

MAX_ORIGIN = 512
"""Characters of an origin that is taken apart: a name has 253. 60,000 took 6 ms of the event loop."""

_ANY = "*"

_LOOKED_AT = frozenset({b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"user-agent"})
"""The headers that tell the requests of web pages apart."""


class Browsers:
    """Refuses with 403 what pages of other sites ask, and requests under names that are not the gateway's."""

    def __init__(self, app: ASGIApp, settings: Settings, shape_of: ShapeOf) -> None:
        """`shape_of`: how errors of a request are written."""
        self._app = app
        self._shape_of = shape_of
        self._host = settings.host.strip("[]").lower()
        self._hosts = {_name_of(name) for name in names_of(settings.allowed_hosts)}
        self._origins = {origin.rstrip("/").lower() for origin in names_of(settings.cors_origins)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["headers"])
            except PermissionDenied as error:
                await self._shape_of(scope).response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, raw: Sequence[tuple[bytes, bytes]]) -> None:
        """Raise PermissionDenied for what a foreign page may have sent."""
        headers = Headers(raw=[pair for pair in raw if pair[0] in _LOOKED_AT])
        is_browser = _is_browser(headers)
        for host in headers.getlist("host"):
            if not self._is_own(host, is_browser=is_browser):
                raise PermissionDenied(
                    f"API keys are off on this gateway, and it does not serve the host name {host:.200}; if it is the"
                    " gateway's, add it to the setting allowed_hosts",
                    code="unknown_host",
                )
        if not is_browser or _ANY in self._origins:
            return
        for origin in headers.getlist("origin"):
            if origin.lower() not in self._origins and not _is_same(origin, headers.get("host", "")):
                raise _foreign(f"pages of {origin:.200}")
        # A link to a page of the gateway is harmless: who follows it sees the answer, the other site does not.
        is_link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if "origin" not in headers and headers.get("sec-fetch-site") == "cross-site" and not is_link:
            raise _foreign("pages of other sites")

    def _is_own(self, host: str, *, is_browser: bool) -> bool:
        """Return whether a name is the gateway's.

        Where it listens for this machine alone, that are this machine's names. Elsewhere others know it by names that
        it cannot know; of these a browser may use those that no stranger's page can have. Where the operator has named
        any, that holds for all clients: a page can hide that a browser sends its requests.
        """
        name = _name_of(host)
        if _ANY in self._hosts or name in self._hosts or name == self._host:
            return True
        if name == "localhost" or name.endswith(".localhost") or _is_address(name):
            return True  # no page of a stranger has an address or this machine as its name
        if is_loopback(self._host):
            return False
        is_program = not is_browser and not self._hosts
        return is_program or "." not in name or name.endswith(PRIVATE_SUFFIXES)


def _foreign(who: str) -> PermissionDenied:
    return PermissionDenied(
        f"API keys are off on this gateway, so {who} may not use it; the setting cors_origins allows them",
        code="foreign_origin",
    )


def _is_browser(headers: Headers) -> bool:
    return "origin" in headers or "sec-fetch-site" in headers or headers.get("user-agent", "").startswith("Mozilla/")


def _is_same(origin: str, host: str) -> bool:
    """Return whether a page of an origin was served by the host that it asks."""
    if len(origin) > MAX_ORIGIN:
        return False
    try:
        return urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:
        return False


def _name_of(host: str) -> str:
    """Return a Host header without its port, brackets and final dot."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
