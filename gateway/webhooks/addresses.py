"""Which IP addresses are of the public internet. Pure."""

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
"""IANA's IPv4 Special-Purpose Address Registry, multicast, and what is reserved."""

_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""All global unicast addresses that IANA has given out. What is outside is refused whole: mapped, compatible and
translated IPv4 (NAT64), loopback, link-local, site-local, unique local, multicast, discard-only, SRv6 and whatever
comes."""

_SPECIAL_V6 = tuple(
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"))
)
"""IANA's IPv6 Special-Purpose Address Registry within it. The first is IETF's: Teredo, benchmarking, ORCHID, AS112 …;
the third is 6to4. Teredo and 6to4 have IPv4 addresses in them, private ones among them, and are not used any more."""

_ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # the third quarter of an address that has an IPv4 address in its last (RFC 5214)


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet. One with a scope, and what is no address, is not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _SPECIAL_V4)
    if ip.scope_id is not None or ip not in _GLOBAL_V6 or (int(ip) >> 32) & 0xFFFF_FFFF in _ISATAP:
        return False
    return not any(ip in network for network in _SPECIAL_V6)
