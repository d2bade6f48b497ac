"""A DNS server on this machine that answers only the configured names."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


@dataclass
class DnsServer(asyncio.DatagramProtocol):
    """Answers names in `known`, and NXDOMAIN for those in `none`; queries for others get no answer."""

    known: Mapping[str, Sequence[str]] = field(default_factory=dict)  # name -> addresses
    none: Sequence[str] = ()
    truncates: bool = False
    hangs: bool = False  # answers no query
    address: str = ""  # ADDRESS:PORT
    asked: Counter[str] = field(default_factory=Counter)
    transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport and its address."""
        self.transport = cast("asyncio.DatagramTransport", transport)
        self.address = "{}:{}".format(*transport.get_extra_info("sockname"))

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer a query, unless it is to get no answer."""
        question = dns.message.from_wire(data)
        [asked] = question.question
        name = asked.name.to_text().removesuffix(".")
        self.asked[name] += 1
        if self.hangs or (name not in self.known and name not in self.none):
            return
        answer = dns.message.make_response(question)
        kind = dns.rdatatype.to_text(asked.rdtype)
        found = [one for one in self.known.get(name, ()) if (":" in one) == (kind == "AAAA")]
        if name in self.none:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif found:
            answer.answer.append(dns.rrset.from_text(asked.name, 60, "IN", kind, *found))
        if self.truncates:
            answer.flags |= dns.flags.TC
        assert self.transport is not None
        self.transport.sendto(answer.to_wire(max_size=65535), addr)


@asynccontextmanager
async def answering(server: DnsServer | None = None) -> AsyncIterator[DnsServer]:
    """Run a DNS server on a port of 127.0.0.1."""
    server = server or DnsServer()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: server, local_addr=("127.0.0.1", 0)
    )  # fmt: skip
    try:
        yield server
    finally:
        transport.close()
