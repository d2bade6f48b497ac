"""A queue of several servers that Sentinels watch over: which of them is the primary, asked for every new connection.

Its URL is `redis-sentinel://USER@HOST:PORT,HOST:PORT/NAME/DB`, with `rediss-sentinel` where servers and Sentinels speak
TLS: the addresses are those of the Sentinels, NAME is what they call the primary, and USER is the user of its servers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis.asyncio as aioredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

SCHEMES = {"redis-sentinel": "redis", "rediss-sentinel": "rediss"}
"""Scheme of a URL with Sentinels -> that of their servers' own."""

DEFAULT_PORT = 26379

ASK_S = 1.0
"""Most time until a Sentinel has answered; then the next one is asked."""

PASSWORD = "sentinel_password"
"""Field of a URL's query: the Sentinels' own password, where they have one."""


@dataclass(slots=True)
class Sentinels:
    """Those who know which server is the primary. The one that answered last is asked first."""

    addresses: list[tuple[str, int]]
    name: str  # name of the primary in the Sentinels' configuration
    password: str | None = field(default=None, repr=False)
    tls: dict[str, Any] | None = None  # arguments of connections to them; None: they are not encrypted
    known: tuple[str, int] | None = None  # the primary that this process has connected to last

    async def primary(self) -> tuple[str, int]:
        """Return the primary's address. Raises a connection error when no Sentinel answers or knows it."""
        failures: list[str] = []
        for address in list(self.addresses):
            try:
                found = await self._ask(address)
            except (RedisError, OSError, TimeoutError) as error:
                failures.append(f"{address[0]}:{address[1]}: {error or type(error).__name__}")
                continue
            if found:
                self.addresses.remove(address)
                self.addresses.insert(0, address)
                return found[0].decode(), int(found[1])
            failures.append(f"{address[0]}:{address[1]} has no primary named {self.name}")
        raise RedisConnectionError(f"no Sentinel names the queue's primary: {'; '.join(failures)}")

    async def _ask(self, address: tuple[str, int]) -> list[bytes] | None:
        kind: Any = aioredis.Connection if self.tls is None else aioredis.SSLConnection
        connection = kind(
            host=address[0],
            port=address[1],
            password=self.password,
            socket_timeout=ASK_S,
            socket_connect_timeout=ASK_S,
            **(self.tls or {}),
        )
        try:
            async with asyncio.timeout(2 * ASK_S):
                await connection.connect()
                await connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
                return await connection.read_response()
        finally:
            await connection.disconnect()


@cache
def split(url: str) -> tuple[Sentinels, str]:
    """Return the Sentinels of a URL, and a URL of the servers without their address. Raises ValueError.

    All connections of a process with one URL share what they know of its primary.
    """
    parts = urlsplit(url)
    user, _, hosts = parts.netloc.rpartition("@")
    name, _, database = parts.path.strip("/").partition("/")
    if not hosts or not name:
        raise ValueError("a queue behind Sentinels is redis-sentinel://USER@HOST:PORT,HOST:PORT/NAME/DB")
    options = dict(parse_qsl(parts.query))
    password = options.pop(PASSWORD, None)
    tls = {key: value for key, value in options.items() if key.startswith("ssl_")} if "rediss" in parts.scheme else None
    sentinels = Sentinels([_address(host) for host in hosts.split(",")], unquote(name), password, tls)
    query = f"?{urlencode(options)}" if options else ""
    return sentinels, f"{SCHEMES[parts.scheme]}://{user}{'@' if user else ''}primary/{database or '0'}{query}"


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text!r} is not a Sentinel address")
    return parts.hostname, parts.port or DEFAULT_PORT


def found_by(sentinels: Sentinels, base: Any) -> Any:
    """Return a class of connections like `base` that go to the server that is the primary when they are opened.

    Once one of them has found another primary, the others leave the old one, even if it still answers: what one
    connection wrote, another must be able to read.
    """

    class ToPrimary(base):
        is_of: tuple[str, int] | None = None  # the primary that it is connected to

        async def _connect(self) -> None:
            self.is_of = None
            self.host, self.port = await sentinels.primary()
            await super()._connect()  # pyright: ignore[reportUnknownMemberType]

        async def on_connect_check_health(self, check_health: bool = True) -> None:
            await super().on_connect_check_health(check_health)  # pyright: ignore[reportUnknownMemberType]
            # INFO and not ROLE, which counts as dangerous: services may not run it.
            await self.send_command("INFO", "replication", check_health=False)
            if b"role:master" not in await self.read_response(disable_decoding=True):
                raise RedisConnectionError(f"{self.host}:{self.port} is not the primary: a failover is in progress")
            sentinels.known = (self.host, self.port)
            self.is_of = sentinels.known

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            if self.is_of not in (None, sentinels.known):
                self.is_of = None
                await self.disconnect(nowait=True)
                raise RedisConnectionError(f"{self.host}:{self.port} is no longer the primary")
            await super().send_packed_command(command, check_health)  # pyright: ignore[reportUnknownMemberType]

    return ToPrimary
