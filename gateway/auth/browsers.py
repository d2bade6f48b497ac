"""Protects a gateway without API keys from web pages, unless the operator allows their origin.

A browser sends requests for any page that it shows, also to this machine. `Origin` and `Sec-Fetch-Site` reveal a page
of another site. A page whose own domain name resolves to this machine (DNS rebinding) has that name in `Host`. Clients
other than browsers send neither header, and are not affected.
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
"""Suffixes of names that cannot be registered, so that no foreign page can have one."""

MAX_ORIGIN = 512
"""Characters of an origin that is taken apart: a name has 253. 60,000 took 6 ms of the event loop."""

_ANY = "*"

_LOOKED_AT = frozenset({b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"user-agent"})
"""The headers that identify requests of web pages."""


class Browsers:
    """Refuses requests of other sites' pages, and requests under host names that are not the gateway's, with 403."""

    def __init__(self, app: ASGIApp, settings: Settings, shape_of: ShapeOf) -> None:
        """shape_of: the error format of a request's API."""
        self._app = app
        self._shape_of = shape_of
        self._host = settings.host.strip("[]").lower()
        self._hosts = {_name_of(name) for name in names_of(settings.allowed_hosts)}
        self._origins = {origin.rstrip("/").lower() for origin in names_of(settings.cors_origins)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it."""
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["headers"])
            except PermissionDenied as error:
                await self._shape_of(scope).response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, raw: Sequence[tuple[bytes, bytes]]) -> None:
        """Raise PermissionDenied for a request that a foreign page may have sent."""
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
        # A link to the gateway is harmless: the user sees the answer, the other site does not.
        is_link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if "origin" not in headers and headers.get("sec-fetch-site") == "cross-site" and not is_link:
            raise _foreign("pages of other sites")

    def _is_own(self, host: str, *, is_browser: bool) -> bool:
        """Return whether a host name is the gateway's.

        A loopback listener accepts only this machine's names. Otherwise clients use names that the gateway cannot know;
        of these, browsers may use only names that cannot be registered. Once the operator has set names, this applies
        to all clients: a page can hide that a browser sends its requests.
        """
        name = _name_of(host)
        if _ANY in self._hosts or name in self._hosts or name == self._host:
            return True
        if name == "localhost" or name.endswith(".localhost") or _is_address(name):
            return True  # no foreign page has an IP address or this machine's name
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
    """Return whether a page's origin is the requested host."""
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
