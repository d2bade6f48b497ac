"""Addresses of hosts that strangers name.

The event loop's own resolver asks from four threads that everything in a gateway shares: a few names that no server
answers for would keep the queue's name waiting. A lookup here takes no thread: it is two datagrams from the loop, with
two sockets, which are closed as soon as it ends, is cancelled or has taken `LOOKUP_S`.

An answer is one datagram of 512 bytes, at most 30 addresses: reading more would hold the loop for milliseconds.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.runtime.imports import Late
from protocol.wire.lines import lines_of

if TYPE_CHECKING:
    import dns.asyncresolver
    import dns.nameserver
    from dns import asyncquery as dns_asyncquery
    from dns import asyncresolver as dns_resolver
    from dns import exception as dns_exception
    from dns import nameserver as dns_nameserver
else:  # most gateways send no webhooks
    dns_asyncquery, dns_resolver = Late("dns.asyncquery"), Late("dns.asyncresolver")
    dns_exception, dns_nameserver = Late("dns.exception"), Late("dns.nameserver")

LOOKUP_S = 5.0
"""Most seconds that a lookup takes, whatever the machine's settings say."""

MAX_HOST = 253
"""Characters of the longest name (RFC 1035)."""

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*", re.IGNORECASE | re.ASCII)


class UnknownHostError(Exception):
    """A host has no address, or no server answers; the text says which."""


def is_name(host: str) -> bool:
    """Return whether a host, in ASCII, may be a name of the DNS. One that ends in a number is a way to write IPv4."""
    labels = host.removesuffix(".").split(".")
    return len(host) <= MAX_HOST and all(map(_LABEL.fullmatch, labels)) and _NUMBER.fullmatch(labels[-1]) is None


def is_address(host: str) -> bool:
    """Return whether a host is an IP address, without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class HostNames:
    """Looks names up as the machine is set up to: /etc/hosts, then the servers of /etc/resolv.conf with its search."""

    def __init__(
        self,
        server: str = "",
        *,
        hosts: Path = Path("/etc/hosts"),
        resolv: Path = Path("/etc/resolv.conf"),
        port: int = 53,
        lookup_s: float = LOOKUP_S,
    ) -> None:
        """server: `ADDRESS` or `ADDRESS:PORT` of the one DNS server to ask, of IPv4; "" for what `resolv` says.

        port: of the servers of `resolv`. lookup_s: most seconds that a lookup takes.
        """
        self._server = server
        self._port = port
        self._lookup_s = lookup_s
        self._hosts = hosts
        self._resolv = resolv
        self._read: tuple[tuple[int, int], dict[str, list[str]], dns.asyncresolver.Resolver] | None = None

    async def addresses(self, host: str) -> list[str]:
        """Return the addresses of a host, at least one, those that there is a route to first.

        host: in ASCII. Raises UnknownHostError.
        """
        if is_address(host):
            return [host]
        if not is_name(host):
            raise UnknownHostError("it is not a valid name")
        known, resolver = await self._settings()
        found = known.get(host.lower().removesuffix(".")) or await self._asked(resolver, host)
        return sorted(found, key=_has_no_route)

    async def _asked(self, resolver: dns.asyncresolver.Resolver, host: str) -> list[str]:
        """Ask for addresses of both kinds at once, and take what has come in time. Raises UnknownHostError."""
        kinds = [asyncio.create_task(self._of_kind(resolver, host, kind)) for kind in ("A", "AAAA")]
        try:
            done, late = await asyncio.wait(kinds, timeout=self._lookup_s)
        finally:
            for kind in kinds:
                kind.cancel()
            answers = await asyncio.gather(*kinds, return_exceptions=True)
        found = [address for answer in answers if isinstance(answer, list) for address in answer]
        if found:
            return found
        if late:
            raise UnknownHostError(f"no DNS server answers within {self._lookup_s:g} s")
        error = next((one.exception() for one in done if one.exception() is not None), None)
        if error is not None:
            raise UnknownHostError(f"{type(error).__name__}: {error}"[:200]) from error
        raise UnknownHostError("it has no address")

    async def _of_kind(self, resolver: dns.asyncresolver.Resolver, host: str, kind: str) -> list[str]:
        answer = await resolver.resolve(
            host, kind, raise_on_no_answer=False, search=not self._server, lifetime=self._lookup_s
        )
        return [record.address for record in answer.rrset or ()]

    def _reading(self) -> tuple[dict[str, list[str]], dns.asyncresolver.Resolver]:
        try:
            resolver = dns_resolver.Resolver(filename=str(self._resolv), configure=not self._server)
        except dns_exception.DNSException as error:
            raise UnknownHostError(f"{self._resolv} lists no DNS server") from error
        address, _, port = self._server.partition(":")
        servers = [(address, int(port or 53))] if address else [(str(one), self._port) for one in resolver.nameservers]
        resolver.nameservers = [_datagrams_to(*one) for one in servers]
        return _hosts_of(self._hosts), resolver

    async def _settings(self) -> tuple[dict[str, list[str]], dns.asyncresolver.Resolver]:
        """Return what both files say now. Raises UnknownHostError if they name no server."""
        changed = _changed_ns(self._hosts), _changed_ns(self._resolv)
        if self._read is None or self._read[0] != changed:
            # The first time it imports what asks, which takes a fifth of a second.
            self._read = changed, *await asyncio.to_thread(self._reading)
        return self._read[1], self._read[2]


def _hosts_of(path: Path) -> dict[str, list[str]]:
    """Return the addresses of each name that a file as /etc/hosts has; none if there is no such file."""
    found: dict[str, list[str]] = {}
    for line in lines_of(path.read_text(errors="replace")) if path.exists() else ():
        address, *names = line.partition("#")[0].split() or [""]
        for name in names if is_address(address) else ():
            found.setdefault(name.lower(), []).append(address)
    return found


def _datagrams_to(address: str, port: int) -> dns.nameserver.Nameserver:
    """Return a DNS server that is asked by one datagram. What does not fit into its answer is left out of it."""

    class Datagrams(dns_nameserver.Do53Nameserver):
        async def async_query(self, request: Any, timeout: float, *_: Any, **__: Any) -> Any:
            return await dns_asyncquery.udp(
                request, self.address, timeout, self.port, ignore_errors=True, ignore_unexpected=True
            )

    return Datagrams(address, port)


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _has_no_route(address: str) -> bool:
    """Return whether this machine has no way to an address. Nothing is sent: UDP is connected by a look at routes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
    except OSError:
        return True
    return False
