"""Groups client addresses for limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from typing import Any


def origin_of(address: Any) -> str:
    """Return the address that limits count by: an IPv4 address or an IPv6 /64; "" for this machine's own."""
    return _origin(address[0]) if isinstance(address, tuple) else ""


def client_of(scope: Mapping[str, Any]) -> str:
    """Return the same for the sender of a request, given as an ASGI scope; "" if unknown."""
    client = scope.get("client")
    return origin_of(tuple(client)) if client else ""


@lru_cache(1024)
def _origin(host: str) -> str:
    ip = ipaddress.ip_address(host.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return ""
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))
