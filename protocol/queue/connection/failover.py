"""A queue of several servers watched by Sentinels, which are asked for the primary before every new connection.

Its URL is `redis-sentinel://USER@HOST:PORT,HOST:PORT/NAME/DB`, or `rediss-sentinel` if servers and Sentinels use TLS.
The addresses are those of the Sentinels, NAME is their name for the primary, and USER is a user of its servers.
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
"""Scheme of a URL with Sentinels -> scheme for their servers."""

DEFAULT_PORT = 26379

ASK_S = 1.0
"""Maximum seconds to wait for a Sentinel's answer; then the next one is asked."""

PASSWORD = "sentinel_password"
"""Parameter of a URL's query: the Sentinels' own password, if they have one."""


@dataclass(slots=True)
class Sentinels:
    """The Sentinels that know the primary. The one that has answered last is asked first."""

    addresses: list[tuple[str, int]]
    name: str  # name of the primary in the Sentinels' configuration
    password: str | None = field(default=None, repr=False)
    tls: dict[str, Any] | None = None  # arguments of TLS connections to them; None: no TLS
    known: tuple[str, int] | None = None  # the primary to which this process has connected last

    async def primary(self) -> tuple[str, int]:
        """Return the primary's address. Raises a connection error if no Sentinel answers or knows the primary."""
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
    """Return a URL's Sentinels, and a URL for the servers without an address. Raises ValueError.

    All connections of a process that use the same URL share its `Sentinels`.
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
    """Return a subclass of the connection class `base` that connects to the current primary.

    Once a connection has found another primary, all others leave the old one, even if it still answers: what one
    connection writes, another must be able to read.
    """

    class ToPrimary(base):
        is_of: tuple[str, int] | None = None  # the primary to which it is connected

        async def _connect(self) -> None:
            self.is_of = None
            self.host, self.port = await sentinels.primary()
            await super()._connect()  # pyright: ignore[reportUnknownMemberType]

        async def on_connect_check_health(self, check_health: bool = True) -> None:
            await super().on_connect_check_health(check_health)  # pyright: ignore[reportUnknownMemberType]
            # INFO instead of ROLE, which is in the category of dangerous commands that services may not run.
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
