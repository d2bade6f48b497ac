"""Clients' host names are resolved without threads, by the machine's settings, within a bounded time."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest
from helpers.waiting import wait_until

from chaos.dns_server import DnsServer, answering
from gateway.webhooks.names import HostNames, UnknownHostError, is_address, is_name


def num_sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            continue
    return found


async def test_a_name_has_addresses_of_both_kinds() -> None:
    known = {"a.example": ["127.0.0.7", "127.0.0.8"], "six.example": ["::1"]}
    async with answering(DnsServer(known | {"A.Example": known["a.example"]}, none=["gone.example"])) as server:
        names = HostNames(server.address)
        for host in ("a.example", "A.Example."):
            assert set(await names.addresses(host)) == {"127.0.0.7", "127.0.0.8"}
        assert await names.addresses("six.example") == ["::1"]
        with pytest.raises(UnknownHostError, match="NXDOMAIN"):
            await names.addresses("gone.example")
        assert await names.addresses("10.1.2.3") == ["10.1.2.3"]
        assert await names.addresses("fe80::1") == ["fe80::1"]


async def test_what_is_no_name_is_not_asked() -> None:
    async with answering() as server:
        for host in ("127.1", "0", "2130706433", "0x7f000001", "a..b", "-a.example", "a" * 64, "a." * 127 + "ab", "ü"):
            with pytest.raises(UnknownHostError, match="not a valid name"):
                await HostNames(server.address).addresses(host)
        assert not server.asked


async def test_names_of_the_machine_s_own_file_come_first(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# a.example\n127.0.0.9 here.example also # not\nno-address wrong.example\n::1 also\n\n")
    async with answering(DnsServer({"here.example": ["127.0.0.1"]}, none=["not"])) as server:
        names = HostNames(server.address, hosts=hosts)
        assert await names.addresses("HERE.example") == ["127.0.0.9"]
        assert await names.addresses("also") == ["127.0.0.9", "::1"]
        with pytest.raises(UnknownHostError):
            await names.addresses("not")
        hosts.write_text("127.0.0.10 here.example\n")
        os.utime(hosts, ns=(1, 1))
        assert await names.addresses("here.example") == ["127.0.0.10"]


async def test_the_machine_s_domains_are_searched(tmp_path: Path) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\nsearch cluster.local example\noptions ndots:2\n")
    async with answering(DnsServer({"svc.example": ["127.0.0.3"]}, none=["svc.cluster.local", "svc"])) as server:
        port = int(server.address.partition(":")[2])
        names = HostNames(hosts=tmp_path / "none", resolv=resolv, port=port)
        assert await names.addresses("svc") == ["127.0.0.3"]
        assert list(server.asked) == ["svc.cluster.local", "svc.example"]


async def test_no_settings_are_no_crash(tmp_path: Path) -> None:
    names = HostNames(hosts=tmp_path / "none", resolv=tmp_path / "none")
    with pytest.raises(UnknownHostError, match="lists no DNS server"):
        await names.addresses("a.example")


async def test_an_answer_that_is_cut_off_is_used_as_far_as_it_goes() -> None:
    async with answering(DnsServer({"a.example": ["127.0.0.7"]}, truncates=True)) as server:
        assert await HostNames(server.address).addresses("a.example") == ["127.0.0.7"]


async def test_a_lookup_that_is_cancelled_leaves_nothing() -> None:
    async with answering(DnsServer({"warm.example": ["127.0.0.1"]})) as server:
        names = HostNames(server.address)
        await names.addresses("warm.example")
        before = num_sockets()
        lookups = [asyncio.create_task(names.addresses(f"silent{number}.example")) for number in range(50)]
        await wait_until(lambda: len(server.asked) == 51, "all are asked for")
        assert num_sockets() <= before + 2 * len(lookups)
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)
        await wait_until(lambda: num_sockets() <= before, "their sockets are closed")


async def test_silence_ends() -> None:
    async with answering() as server:
        with pytest.raises(UnknownHostError, match=r"within 0\.2 s"):
            await HostNames(server.address, lookup_s=0.2).addresses("silent.example")


async def test_names_that_nobody_answers_keep_no_other_waiting() -> None:
    """With more pending lookups than the loop has threads, neither other names nor the loop's own lookups wait."""
    async with answering(DnsServer({"a.example": ["127.0.0.7"]})) as server:
        names = HostNames(server.address, lookup_s=600.0)
        hanging = [asyncio.create_task(names.addresses(f"silent{number}.example")) for number in range(60)]
        await wait_until(lambda: len(server.asked) == 60, "all are asked for")
        assert await names.addresses("a.example") == ["127.0.0.7"]
        await asyncio.get_running_loop().getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
        assert not any(lookup.done() for lookup in hanging)
        for lookup in hanging:
            lookup.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)


async def test_the_largest_answer_takes_no_time_of_the_loop() -> None:
    """CPU time, averaged over many lookups of 30 addresses with a name of maximum length."""
    host = ".".join(["a" * 61] * 4)
    async with answering(DnsServer({host: [f"10.0.0.{number}" for number in range(15)]})) as server:
        names = HostNames(server.address)
        await names.addresses(host)
        began = time.process_time()
        for _ in range(20):
            await names.addresses(host)
        assert (time.process_time() - began) / 20 < 0.1  # includes both servers and clients


@pytest.mark.parametrize("host", ["a", "a.b.", "xn--bcher-kva.example", "a_b.example", "1a.example", "8.8.8.a"])
def test_names(host: str) -> None:
    assert is_name(host)
    assert not is_address(host)
