"""POSTs to URLs that strangers have named: only to addresses of the public internet, without redirects, bounded.

The name is resolved here and the request goes to the address that was looked at, so that it cannot change in between
(DNS rebinding).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping
from functools import cached_property
from urllib.parse import urlsplit

import httpx2

from protocol.wire.errors import BadRequest

TIMEOUT_S = 15.0
MAX_URL_CHARACTERS = 2048

TRANSLATED = tuple(ipaddress.ip_network(name) for name in ("64:ff9b::/96", "64:ff9b:1::/48"))
"""Addresses that a NAT64 translates to IPv4 (RFC 6052, RFC 8215), private ones among them."""


class UnreachableError(Exception):
    """The URL cannot be asked; the text says why, to its owner."""


class Outside:
    """A client for URLs of strangers."""

    def __init__(self, *, private: bool) -> None:
        """private: whether http:// and addresses of private networks are allowed."""
        self._private = private

    @cached_property
    def _http(self) -> httpx2.AsyncClient:
        """Made by the first call: most gateways make none, and it reads all certificates."""
        limits = httpx2.Limits(max_keepalive_connections=0)
        return httpx2.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False, follow_redirects=False)

    async def close(self) -> None:
        """Close all connections."""
        if "_http" in self.__dict__:
            await self._http.aclose()

    def check(self, url: str) -> None:
        """Refuse a URL by its form. Raises BadRequest."""
        schemes = ("https", "http") if self._private else ("https",)
        if len(url) > MAX_URL_CHARACTERS:
            raise BadRequest(f"url has {len(url)} characters; the limit is {MAX_URL_CHARACTERS}", param="url")
        try:
            parts = urlsplit(url)
            httpx2.URL(url)
        except (ValueError, httpx2.InvalidURL) as error:
            raise BadRequest(f"url is none: {url!r:.100}: {error}", param="url") from error
        if parts.scheme not in schemes or not parts.hostname or parts.username is not None:
            raise BadRequest(f"url must be {' or '.join(schemes)} with a host and no user: {url!r:.100}", param="url")
        try:
            _ = parts.port
        except ValueError as error:
            raise BadRequest(f"url has no port that exists: {url!r:.100}", param="url") from error

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Send a body; return the status of the answer, which is not read. Raises UnreachableError."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                address = await self._address(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
                shown = f"[{address}]" if ":" in address else address
                place = parts._replace(netloc=f"{shown}:{parts.port}" if parts.port else shown, fragment="")
                request = self._http.build_request(
                    "POST", place.geturl(), content=body, headers={**headers, "host": parts.netloc},
                    extensions={"sni_hostname": parts.hostname},
                )  # fmt: skip
                answer = await self._http.send(request, stream=True)
                await answer.aclose()
                return answer.status_code
        except TimeoutError as error:
            raise UnreachableError(f"no answer within {TIMEOUT_S:.0f} s") from error
        except httpx2.HTTPError as error:
            raise UnreachableError(f"{type(error).__name__}: {error}"[:200]) from error

    async def _address(self, host: str, port: int) -> str:
        """Return an address of a host, all of whose addresses may be asked. Raises UnreachableError."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise UnreachableError(f"the host {host!r:.100} is not known") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not self._private and not all(map(is_public, addresses)):
            raise UnreachableError(f"the host {host!r:.100} has an address that is not of the public internet")
        return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    teredo = getattr(ip, "teredo", None)
    checked = [ip, *([inner] if inner else []), *(teredo or ())]
    if any(ip in network for network in TRANSLATED if network.version == ip.version):
        return False
    return all(one.is_global and not one.is_multicast for one in checked)
