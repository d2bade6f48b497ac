"""POSTs to URLs that clients supply, which are untrusted: only to public addresses, without redirects, bounded.

The host is resolved here, and the request goes to the checked address, so that it cannot change in between (DNS
rebinding). Only the status line of the answer is read. An HTTP client would read all headers, and any number of interim
answers (100 Continue), which would block the loop.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from gateway.webhooks.addresses import is_public
from gateway.webhooks.names import MAX_HOST, HostNames, UnknownHostError, is_address, is_name
from gateway.webhooks.places import PlacesByHost
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

TIMEOUT_S = 15.0
"""Maximum seconds of an attempt, from the lookup to the status."""

MAX_URL_CHARACTERS = 2048
MAX_LINE = 1024
"""Maximum bytes of a line of an answer."""

MAX_LINES = 64
"""Maximum lines of an answer up to its final status line, including all interim answers such as 100 Continue."""

AT_ONE_RECEIVER = 8
"""Concurrent requests to one host, for all tenants."""

AT_ONE_RECEIVER_OF_TENANT = 2

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES"
"""Cipher suites offered for TLS 1.2, in OpenSSL's notation. DHE is not among them: the receiver would choose its
parameters, and 10,000 bits held the event loop for 0.7 s of CPU."""

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?:[ \r]|$)")


class UnreachableError(Exception):
    """The URL cannot be reached; the message says why, for its owner."""


class BusyReceiverError(Exception):
    """Too many requests to the URL's host are in progress, so this one must wait."""


@dataclass(frozen=True, slots=True)
class WebhookTarget:
    """The destination of a request, in ASCII."""

    scheme: str
    host: str  # without brackets
    port: int
    authority: str  # value of the header `host`
    path: str  # with the query


class Outside:
    """Sends requests to untrusted URLs."""

    def __init__(
        self,
        *,
        private: bool,
        names: HostNames | None = None,
        timeout_s: float = TIMEOUT_S,
        authority: Path | None = None,
    ) -> None:
        """private: allow http:// and private addresses. timeout_s: of one request.

        authority: file with the trusted certificates; None: those that this machine trusts.
        """
        self._private = private
        self._names = names or HostNames()
        self._timeout_s = timeout_s
        self._receivers = PlacesByHost(AT_ONE_RECEIVER, AT_ONE_RECEIVER_OF_TENANT)
        self._authority = authority
        self._tls: ssl.SSLContext | None = None

    def check(self, url: str) -> None:
        """Refuse an invalid or disallowed URL. Raises BadRequest."""
        schemes = ("https", "http") if self._private else ("https",)
        if len(url) > MAX_URL_CHARACTERS:
            raise BadRequest(f"url has {len(url)} characters; the limit is {MAX_URL_CHARACTERS}", param="url")
        try:
            target = target_of(url)
        except ValueError as error:
            raise BadRequest(f"url is not a valid URL: {brief(url)}: {error}", param="url") from error
        if target.scheme not in schemes:
            raise BadRequest(f"url must be {' or '.join(schemes)}: {brief(url)}", param="url")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], tenant: str) -> int:
        """Send a body on behalf of a tenant; return the answer's status, of which nothing else is read.

        Raises UnreachableError, and BusyReceiverError if nothing was sent.
        """
        try:
            target = target_of(url)
        except ValueError as error:  # stored by a release with other rules
            raise UnreachableError(f"the URL cannot be used: {error}") from error
        with self._receivers.held(target.host.lower(), tenant) as has_room:
            if not has_room:
                raise BusyReceiverError(
                    f"{AT_ONE_RECEIVER_OF_TENANT} requests of yours, or {AT_ONE_RECEIVER} of all tenants, are being"
                    f" sent to {target.host:.100}; these are the limits"
                )
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._ask(target, body, headers)
            except TimeoutError as error:
                raise UnreachableError(f"no answer within {self._timeout_s:g} s") from error
            except (OSError, EOFError, UnicodeError, asyncio.LimitOverrunError) as error:  # TLS raises an OSError
                raise UnreachableError(f"{type(error).__name__}: {error}"[:200]) from error

    async def _ask(self, target: WebhookTarget, body: bytes, headers: Mapping[str, str]) -> int:
        address = await self._address(target.host)
        tls = await self._context() if target.scheme == "https" else None
        head = [f"POST {target.path} HTTP/1.1", f"host: {target.authority}"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        head += [f"content-length: {len(body)}", "connection: close", "", ""]
        reader, writer = await asyncio.open_connection(
            address,
            target.port,
            limit=MAX_LINE,
            ssl=tls,
            server_hostname=target.host.removesuffix(".") if tls else None,
        )
        try:
            writer.write("\r\n".join(head).encode("ascii") + body)
            return await _status(reader)
        finally:
            writer.transport.abort()  # without waiting for the receiver's TLS shutdown

    async def _address(self, host: str) -> str:
        """Return an address of a host, if all of its addresses are allowed. Raises UnreachableError."""
        try:
            addresses = await self._names.addresses(host)
        except UnknownHostError as error:
            raise UnreachableError(f"the host {brief(host)} is not known: {error}") from error
        if not self._private and not all(map(is_public, addresses)):
            raise UnreachableError(f"the host {brief(host)} has an address that is not of the public internet")
        return addresses[0]

    async def _context(self) -> ssl.SSLContext:
        if self._tls is None:  # created on first use: it loads all certificates
            self._tls = await asyncio.to_thread(_tls_context, self._authority)
        return self._tls


def _tls_context(authority: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority) if authority else httpx2.create_ssl_context(trust_env=False)
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION  # a receiver could ask for one handshake after another
    return context


async def _status(reader: asyncio.StreamReader) -> int:
    """Return the final status of an answer. Raises UnreachableError, EOFError, LimitOverrunError."""
    is_first = True
    status = 0
    for _ in range(MAX_LINES):
        line = await reader.readuntil(b"\n")
        if is_first:
            found = _STATUS.match(line.rstrip(b"\n"))
            if found is None:
                raise UnreachableError("the endpoint's answer is not HTTP")
            status = int(found[1])
            if not 100 <= status < 200 or status == 101:
                return status
        is_first = not line.strip()  # an interim answer has ended
    raise UnreachableError(f"the endpoint sent no status within {MAX_LINES} lines")


def target_of(url: str) -> WebhookTarget:
    """Parse a URL, its host converted to the form of the DNS (IDNA). Raises ValueError if it is not allowed."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("it has no host")
    if len(parts.hostname) > MAX_HOST:
        raise ValueError(f"its host has {len(parts.hostname)} characters; the limit is {MAX_HOST}")
    try:
        read = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(str(error)) from error
    if parts.username is not None or read.userinfo:
        raise ValueError("it has a user")
    host = read.raw_host.decode("ascii")
    if not is_name(host) and not is_address(host):
        raise ValueError(f"{brief(host)} is neither a DNS name nor an IP address")
    port = read.port
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"there is no port {port}")
    return WebhookTarget(
        scheme=read.scheme,
        host=host,
        port=port or (443 if read.scheme == "https" else 80),
        authority=read.netloc.decode("ascii"),
        path=read.raw_path.decode("ascii"),
    )
