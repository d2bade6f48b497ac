"""Resolves host names that clients supply, which are untrusted.

The event loop's own resolver uses four threads shared by the whole gateway: a few names whose servers do not respond
would delay the lookup of the queue's name. A lookup here uses no thread, but two datagrams from the event loop, on two
sockets that are closed when it ends, is cancelled or times out after `LOOKUP_S`.

An answer is one datagram of 512 bytes, at most 30 addresses: parsing more would block the loop for milliseconds.
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
"""Maximum seconds of a lookup, whatever the machine's resolver settings are."""

MAX_HOST = 253
"""Maximum characters of a host name (RFC 1035)."""

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*", re.IGNORECASE | re.ASCII)


class UnknownHostError(Exception):
    """A host has no address, or no server responds; the message says which."""


def is_name(host: str) -> bool:
    """Return whether an ASCII host may be a DNS name. Names that end in a number are forms of IPv4 addresses."""
    labels = host.removesuffix(".").split(".")
    return len(host) <= MAX_HOST and all(map(_LABEL.fullmatch, labels)) and _NUMBER.fullmatch(labels[-1]) is None


def is_address(host: str) -> bool:
    """Return whether a host is an IP address without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class HostNames:
    """Resolves names as the machine does: by /etc/hosts, then the servers and search list of /etc/resolv.conf."""

    def __init__(
        self,
        server: str = "",
        *,
        hosts: Path = Path("/etc/hosts"),
        resolv: Path = Path("/etc/resolv.conf"),
        port: int = 53,
        lookup_s: float = LOOKUP_S,
    ) -> None:
        """server: `ADDRESS` or `ADDRESS:PORT` (IPv4) of the only DNS server to use; "": those in `resolv`.

        port: of the servers in `resolv`. lookup_s: maximum seconds of a lookup.
        """
        self._server = server
        self._port = port
        self._lookup_s = lookup_s
        self._hosts = hosts
        self._resolv = resolv
        self._read: tuple[tuple[int, int], dict[str, list[str]], dns.asyncresolver.Resolver] | None = None

    async def addresses(self, host: str) -> list[str]:
        """Return the addresses of a host, at least one, reachable ones first.

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
        """Query IPv4 and IPv6 addresses concurrently, and return those received in time. Raises UnknownHostError."""
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
        """Return the hosts and resolver by the current files. Raises UnknownHostError if no server is configured."""
        changed = _changed_ns(self._hosts), _changed_ns(self._resolv)
        if self._read is None or self._read[0] != changed:
            # In a thread: the first call imports the resolver, which takes 200 ms.
            self._read = changed, *await asyncio.to_thread(self._reading)
        return self._read[1], self._read[2]


def _hosts_of(path: Path) -> dict[str, list[str]]:
    """Return the addresses per name in a file like /etc/hosts; none if it does not exist."""
    found: dict[str, list[str]] = {}
    for line in lines_of(path.read_text(errors="replace")) if path.exists() else ():
        address, *names = line.partition("#")[0].split() or [""]
        for name in names if is_address(address) else ():
            found.setdefault(name.lower(), []).append(address)
    return found


def _datagrams_to(address: str, port: int) -> dns.nameserver.Nameserver:
    """Return a DNS server that is queried by one datagram. A truncated answer is used as it is."""

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
    """Return whether this machine has no route to an address. Nothing is sent: connecting UDP only checks routes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
    except OSError:
        return True
    return False
