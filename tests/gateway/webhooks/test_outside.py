"""URLs of clients reach the public internet only, with bounded costs whatever receivers do."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from helpers.authority import Authority
from helpers.processes import num_open_files
from helpers.waiting import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.dns_server import DnsServer, answering
from gateway.webhooks.addresses import is_public
from gateway.webhooks.names import HostNames
from gateway.webhooks.outside import (
    AT_ONE_RECEIVER,
    AT_ONE_RECEIVER_OF_TENANT,
    BusyReceiverError,
    Outside,
    UnreachableError,
    target_of,
)
from protocol.wire.errors import BadRequest

SPECIAL = (
    # iana.org/assignments/iana-ipv4-special-registry
    "0.0.0.0/8", "0.0.0.0/32", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.9/32", "192.0.0.10/32", "192.0.0.170/31", "192.0.2.0/24",
    "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15",
    "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4", "255.255.255.255/32",
    # multicast
    "224.0.0.0/4",
    # iana.org/assignments/iana-ipv6-special-registry
    "::1/128", "::/128", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23",
    "2001::/32", "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:2::/48", "2001:3::/32", "2001:4:112::/48",
    "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    "5f00::/16", "fc00::/7", "fe80::/10",
    # IPv4-compatible, IPv4-translated, site-local, multicast, and unassigned by IANA
    "::/96", "::ffff:0:0:0/96", "fec0::/10", "ff00::/8", "4000::/3", "8000::/2", "c000::/3", "e000::/4", "200::/7",
)  # fmt: skip
PRIVATE = (
    "fec0::1", "::127.0.0.1", "3fff::1", "5f00::1", "fe80::1%eth0", "2606:4700::1111%1", "::ffff:1.1.1.1",
    "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:a00:1", "", "1.1.1", "localhost", "1.1.1.1\n",
)  # fmt: skip
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@settings(deadline=None)
@given(st.sampled_from(SPECIAL), st.integers(0, (1 << 128) - 1))
def test_no_address_of_a_special_range_is_public(network: str, offset: int) -> None:
    block = ipaddress.ip_network(network)
    for address in (block[0], block[-1], block[offset % block.num_addresses]):
        assert not is_public(str(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001:81b::200e"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]", "0"]
)
async def test_names_of_this_machine_are_not_asked(host: str) -> None:
    async with answering(DnsServer({"localhost": ["127.0.0.1"]})) as server:
        outside = Outside(private=False, names=HostNames(server.address))
        with pytest.raises(UnreachableError, match=r"not of the public internet|neither a DNS name"):
            await outside.post(f"https://{host}/", b"", {}, "a")


async def test_one_private_address_among_many_is_too_many() -> None:
    async with answering(DnsServer({"a.example": ["1.1.1.1", "10.0.0.1"]})) as server:
        with pytest.raises(UnreachableError, match="not of the public internet"):
            await Outside(private=False, names=HostNames(server.address)).post("https://a.example/", b"", {}, "a")


@pytest.mark.parametrize(
    "url",
    [
        "https://[", "https://[::1", "https://a/\x01", "https://a:x", "https://a:0", "https://a:99999", "https://",
        "https://\u2100.example", "https://🤖.example", "https://ex\u00adample.com", "https://a..b", "https://-a.example",
        "https://" + "a" * 64 + ".example", "https://" + "a." * 127 + "example", "https://127.1", "https://0x7f.1",
        "https://a%2eb.example", "https://a b", "https://u@a.example", "https://u:p@a.example", "https://a\\@b.example",
        "https://" + "ü" * 300,
    ],
)  # fmt: skip
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(BadRequest, match=r"^url"):
        Outside(private=False).check(url)


def test_http_is_for_private_networks() -> None:
    with pytest.raises(BadRequest, match="must be https"):
        Outside(private=False).check("http://example.com")
    Outside(private=True).check("http://example.com")


def test_an_international_name_is_asked_for_in_ascii() -> None:
    target = target_of("https://Bücher.example:8443/hök?a=ü b#part")
    assert (target.host, target.authority) == ("xn--bcher-kva.example", "xn--bcher-kva.example:8443")
    assert (target.path, target.port) == ("/h%C3%B6k?a=%C3%BC%20b", 8443)
    assert target_of("https://[2606:4700::1111]/").host == "2606:4700::1111"


# ---------------------------------------------------------------- receivers


@asynccontextmanager
async def receiving(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    tasks: set[asyncio.Task[None]] = set()

    async def serve_until_gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve_until_gone, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        for task in tasks:
            task.cancel()
        server.close()


def saying(*parts: bytes, for_ever: bytes = b"", every_s: float = 0.0, closes: bool = False) -> Serve:
    """Return a receiver that reads a request, sends `parts`, then `for_ever` repeatedly, and stays connected."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
        while for_ever:
            writer.write(for_ever)
            await writer.drain()
            await asyncio.sleep(every_s)
        if not closes:
            await asyncio.Event().wait()

    return serve


async def posted(port: int, timeout_s: float = 5.0) -> int:
    outside = Outside(private=True, timeout_s=timeout_s)
    return await outside.post(f"http://127.0.0.1:{port}/hook", b"{}", {"a": "b"}, "a")


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"HTTP/1.1 204 No Content\r\n", 204), (b"HTTP/1.0 200\r\n\r\n", 200), (b"HTTP/1.1 200\n", 200),
        (b"HTTP/1.1 307 Away\r\nlocation: http://127.0.0.1:1/\r\n\r\n", 307),
        (b"HTTP/1.1 100 Continue\r\na: b\r\n\r\nHTTP/1.1 500 No\r\n", 500), (b"HTTP/1.1 101 Other\r\n\r\n", 101),
    ],
)  # fmt: skip
async def test_the_status_is_read_and_nothing_else(said: bytes, status: int) -> None:
    async with receiving(saying(said)) as port:
        assert await posted(port) == status


@pytest.mark.parametrize(
    "serve",
    [
        saying(b"SSH-2.0-OpenSSH_9.6\r\n"), saying(b"HTTP/2 200\r\n"), saying(b"HTTP/1.1 2000 OK\r\n"),
        saying(closes=True), saying(b"HTTP/1.1 200", closes=True), saying(for_ever=b"x" * 65536),
        saying(b"HTTP/1.1 100 Continue\r\n", for_ever=b"a: b\r\n" * 4096),
        saying(for_ever=b"HTTP/1.1 100 Continue\r\n\r\n" * 4096), saying(for_ever=b"\r\n" * 4096),
    ],
)  # fmt: skip
async def test_answers_that_are_none(serve: Serve) -> None:
    async with receiving(serve) as port:
        with pytest.raises(UnreachableError):
            await posted(port)


@pytest.mark.parametrize(
    "serve", [saying(), saying(for_ever=b"H", every_s=0.01), saying(b"HTTP/1.1 100 \r\n", for_ever=b"a", every_s=0.01)]
)
async def test_a_slow_answer_ends_with_its_time_and_its_connection(serve: Serve) -> None:
    before = num_open_files()
    async with receiving(serve) as port:
        outside = Outside(private=True, timeout_s=0.3)
        with pytest.raises(UnreachableError, match=r"^no answer within 0\.3 s$"):
            await outside.post(f"http://127.0.0.1:{port}/", b"", {}, "a")
    await wait_until(lambda: num_open_files() <= before, "all connections are closed")


async def test_a_receiver_that_never_speaks_tls_ends_too() -> None:
    before = num_open_files()
    async with receiving(saying()) as port:
        outside = Outside(private=True, timeout_s=0.3)
        with pytest.raises(UnreachableError, match="no answer within"):
            await outside.post(f"https://127.0.0.1:{port}/", b"", {}, "a")
    async with receiving(saying(b"no tls")) as port:
        with pytest.raises(UnreachableError, match=r"SSL|ConnectionReset|no answer"):
            await Outside(private=True, timeout_s=2.0).post(f"https://127.0.0.1:{port}/", b"", {}, "a")
    await wait_until(lambda: num_open_files() <= before, "all connections are closed")


async def test_what_floods_with_100_continue_holds_no_loop() -> None:
    """A complete HTTP client would read everything, 2,500 answers per read, until its timeout."""
    flood = b"HTTP/1.1 100 Continue\r\n\r\n" * 4096
    async with receiving(saying(flood)) as port:
        began = time.process_time()
        for _ in range(10):
            with pytest.raises(UnreachableError, match="within 64 lines"):
                await posted(port)
        assert (time.process_time() - began) / 10 < 0.2


def test_the_longest_international_names_take_no_time() -> None:
    urls = [f"https://{'.'.join([letter * 40] * 6)}.example/{'ü' * 1500}" for letter in "aüß中ا\u0660"]
    began = time.process_time()
    for url in urls:
        try:
            target_of(url)
        except ValueError:
            continue
    assert (time.process_time() - began) / len(urls) < 0.2


async def test_places_at_a_receiver_are_shared() -> None:
    async with receiving(saying()) as port, answering(DnsServer({"b.example": ["127.0.0.1"]})) as server:
        outside = Outside(private=True, names=HostNames(server.address), timeout_s=30.0)

        def post(tenant: str, host: str = "127.0.0.1") -> asyncio.Task[int]:
            return asyncio.create_task(outside.post(f"http://{host}:{port}/", b"", {}, tenant))

        hanging = [post("a") for _ in range(AT_ONE_RECEIVER_OF_TENANT)]
        await asyncio.sleep(0)
        with pytest.raises(BusyReceiverError, match=f"{AT_ONE_RECEIVER_OF_TENANT} requests of yours"):
            await outside.post(f"http://127.0.0.1:{port}/", b"", {}, "a")
        hanging += [post("a", "b.example"), *(post(f"t{number}") for number in range(2 * AT_ONE_RECEIVER))]
        await asyncio.sleep(0)
        refused = [one.exception() for one in hanging if one.done()]
        assert len(refused) == AT_ONE_RECEIVER + AT_ONE_RECEIVER_OF_TENANT
        assert all(isinstance(error, BusyReceiverError) for error in refused)
        for one in hanging:
            one.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        assert len(outside._receivers) == 0


async def test_a_certificate_must_be_of_the_name_that_was_asked_for(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ours")
    authority.issue("server", "xn--bcher-kva.example")
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shown.load_cert_chain(authority.folder / "server.pem", authority.folder / "server.key")
    known = {"xn--bcher-kva.example": ["127.0.0.1"], "b.example": ["127.0.0.1"]}
    async with (
        receiving(saying(b"HTTP/1.1 200 OK\r\n"), shown) as port,
        answering(DnsServer(known)) as server,
    ):
        names = HostNames(server.address)
        outside = Outside(private=True, names=names, authority=authority.folder / "ca.pem")
        assert await outside.post(f"https://Bücher.example:{port}/", b"{}", {}, "a") == 200
        for other, host in ((outside, "b.example"), (Outside(private=True, names=names), "bücher.example")):
            with pytest.raises(UnreachableError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
                await other.post(f"https://{host}:{port}/", b"{}", {}, "a")


async def test_no_receiver_chooses_the_numbers_of_a_key_exchange(tmp_path: Path) -> None:
    """A power of a number of 10,000 bits takes a third of a second, and the client of TLS takes two, on the loop."""
    authority = Authority.make(tmp_path / "ours")
    authority.issue("server", key=rsa.generate_private_key(65537, 2048))
    prime = (random.getrandbits(2048) | 3 << 2046 | 1).to_bytes(257)  # nobody checks that it is one
    encoded = b"\x30\x82\x01\x08\x02\x82\x01\x01" + prime + b"\x02\x01\x02"
    (tmp_path / "own.pem").write_text(ssl.DER_cert_to_PEM_cert(encoded).replace("CERTIFICATE", "DH PARAMETERS"))
    for ciphers in ("ECDHE", "DHE"):
        shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        shown.load_cert_chain(authority.folder / "server.pem", authority.folder / "server.key")
        shown.load_dh_params(str(tmp_path / "own.pem"))
        shown.maximum_version = ssl.TLSVersion.TLSv1_2
        shown.set_ciphers(ciphers)
        async with receiving(saying(b"HTTP/1.1 200 OK\r\n"), shown) as port:
            outside = Outside(private=True, authority=authority.folder / "ca.pem")
            sent = outside.post(f"https://127.0.0.1:{port}/", b"{}", {}, "a")
            if ciphers == "ECDHE":
                assert await sent == 200
            else:
                with pytest.raises(UnreachableError, match=r"(?i)handshake.failure|ConnectionReset"):
                    await sent
