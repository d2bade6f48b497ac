"""A queue at rediss://: both sides check certificates.

The server in the Python package is built without TLS, so a proxy in front of it speaks TLS.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from helpers.authority import Authority

from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.queue.connection.redis_client import ping
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority.make(tmp_path_factory.mktemp("tls") / "ours")
    authority.issue("server")
    authority.issue("elsewhere", address="192.0.2.1")
    authority.issue("client")
    return authority


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority.make(tmp_path_factory.mktemp("tls") / "theirs")
    authority.issue("client")
    return authority


@asynccontextmanager
async def tls_in_front_of(server: EmbeddedServer, ours: Authority, certificate: str = "server") -> AsyncIterator[str]:
    """Run a TLS proxy in front of a queue that requires client certificates; yield its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ours.folder / f"{certificate}.pem", ours.folder / f"{certificate}.key")
    context.load_verify_locations(ours.folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            return  # one side has disconnected
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_unix_connection(str(server.socket))
        await asyncio.gather(pipe(reader, to_writer), pipe(to_reader, writer))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with listener:
        yield f"rediss://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0"


def settings(url: str, ca: Authority | None, client: Authority | None) -> Settings:
    return Settings(
        redis_url=url,
        redis_ca_file=ca and ca.folder / "ca.pem",
        redis_cert_file=client and client.folder / "client.pem",
        redis_key_file=client and client.folder / "client.key",
    )


async def test_both_sides_show_certificates(queue_server: EmbeddedServer, ours: Authority) -> None:
    async with tls_in_front_of(queue_server, ours) as url:
        address = settings(url, ours, ours).queue_url()
        bus = Bus(address)
        await bus.server.check()
        await bus.streams.create("s", 60)
        assert await bus.streams.read({"s": b"0"}, block_ms=1) == {}
        await bus.close()
        await asyncio.to_thread(ping, address, 5)


@pytest.mark.parametrize("case", ["unknown server", "wrong name", "no client certificate", "unknown client"])
async def test_a_side_that_cannot_be_trusted_is_refused(
    queue_server: EmbeddedServer, ours: Authority, theirs: Authority, case: str
) -> None:
    ca = None if case == "unknown server" else ours
    client = {"no client certificate": None, "unknown client": theirs}.get(case, ours)
    certificate = "elsewhere" if case == "wrong name" else "server"
    async with tls_in_front_of(queue_server, ours, certificate) as url:
        bus = Bus(settings(url, ca, client).queue_url())
        with pytest.raises(CONNECTION_ERRORS):
            await bus.server.check()
        await bus.close()


def test_certificates_without_tls_are_refused(ours: Authority) -> None:
    with pytest.raises(BadRequest, match="rediss://"):
        settings("redis://127.0.0.1/0", ours, None).queue_url()
    with pytest.raises(BadRequest, match="set together"):
        Settings(redis_url="rediss://h/0", redis_cert_file=ours.folder / "client.pem").queue_url()


def test_a_password_file_goes_into_the_url_quoted(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("p@ss/w:rd\n")
    url = Settings(redis_url="redis://worker@h:1/0", redis_password_file=path).queue_url()
    assert url == "redis://worker:p%40ss%2Fw%3Ard@h:1/0"
    with pytest.raises(BadRequest, match="holds a password already"):
        Settings(redis_url="redis://:x@h/0", redis_password_file=path).queue_url()
    with pytest.raises(BadRequest, match="cannot read"):
        Settings(redis_url="redis://h/0", redis_password_file=tmp_path / "none").queue_url()


@pytest.mark.parametrize(
    "url", ["", "http://h/0", "h:6379", "redis://:secret@h:port/0", "redis://h:6379/0?db=x", "redis-sentinel://h:1"]
)
def test_what_is_no_url_of_a_queue_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(BadRequest, match="redis_url is not a queue URL") as refused:
        Bus(url)
    assert "secret" not in refused.value.message
