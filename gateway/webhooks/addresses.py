"""Tells public IP addresses from special ones. Pure."""

from __future__ import annotations

import ipaddress

_SPECIAL_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16",
            "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        ),
    )
)  # fmt: skip
"""IANA's IPv4 Special-Purpose Address Registry, multicast, and reserved networks."""

_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""All global unicast addresses that IANA has allocated. All others are refused: mapped, compatible and translated IPv4
(NAT64), loopback, link-local, site-local, unique local, multicast, discard-only, SRv6 and future ones."""

_SPECIAL_V6 = tuple(
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"))
)
"""The entries of IANA's IPv6 Special-Purpose Address Registry within `_GLOBAL_V6`. The first is IETF's: Teredo,
benchmarking, ORCHID, AS112 …; the third is 6to4. Teredo and 6to4 are obsolete, and embed IPv4 addresses, possibly
private ones."""

_ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # bits 64 to 95 of an address whose last 32 are an IPv4 address (RFC 5214)


def is_public(address: str) -> bool:
    """Return whether an IP address is public. Addresses with a scope, and invalid ones, are not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _SPECIAL_V4)
    if ip.scope_id is not None or ip not in _GLOBAL_V6 or (int(ip) >> 32) & 0xFFFF_FFFF in _ISATAP:
        return False
    return not any(ip in network for network in _SPECIAL_V6)
