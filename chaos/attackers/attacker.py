"""A hostile client, with a valid API key or without one, and the count of the statuses it was answered with."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import orjson

ADDRESS = "127.0.0.2"
"""Source address of attackers: another one of this machine, so that limits per address spare honest clients."""

PATIENCE_S = 180.0
"""Silence after which a call counts as hung: far above every limit, so that a busy machine does not look hung."""

MAX_CONNECTIONS = 2000

REFUSALS = frozenset({"400", "401", "403", "404", "408", "409", "413", "414", "415", "422", "429", "431", "503"})
"""Statuses with which an attacker may always be refused. 500 is a fault of the fleet, and so is silence."""

CLOSED, HELD, HUNG = "closed", "held", "hung"
"""How a connection ends: the gateway closes it, keeps it open as long as the attacker wants, or never answers."""


Reading = Callable[[AsyncIterator[bytes]], Awaitable[None]]
Doing = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Attacker:
    """Sends requests to a gateway, and counts the statuses of its answers in `told`."""

    def __init__(self, url: str, key: str = "", patience_s: float = PATIENCE_S) -> None:
        self.told: Counter[str] = Counter()
        self.key = key
        self.patience_s = patience_s
        self._address = urlsplit(url)
        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=0)
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers=self.headers,
            timeout=httpx2.Timeout(patience_s, connect=patience_s),
            transport=httpx2.AsyncHTTPTransport(local_address=ADDRESS, limits=limits),
        )

    @property
    def headers(self) -> dict[str, str]:
        """Request headers with the API key, if there is one."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # ------------------------------------------------------------ HTTP

    async def post(self, path: str, body: Mapping[str, Any] | bytes, **headers: str) -> Any:
        """Post JSON, or raw bytes sent as JSON; return the JSON of the answer, None if it has none."""
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        return await self.send("POST", path, raw, **headers)

    async def get(self, path: str, **headers: str) -> Any:
        """Send a GET; return the JSON of the answer, None if it has none."""
        return await self.send("GET", path, None, **headers)

    async def send(self, method: str, path: str, raw: bytes | None, **headers: str) -> Any:
        """Send a request and count its answer; return the JSON of the answer, None if it has none."""
        more = {"content-type": "application/json"} if raw is not None else {}
        more |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            answer = await self._http.request(method, path, content=raw, headers=more)
        except httpx2.TimeoutException:
            self.told[HUNG] += 1
            return None
        except httpx2.TransportError:
            self.told[CLOSED] += 1
            return None
        found: Any = None
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            with contextlib.suppress(orjson.JSONDecodeError):
                found = orjson.loads(answer.content)
        self.told[_status(answer.status_code, found)] += 1
        return found

    async def stream(self, path: str, body: Mapping[str, Any] | None, read: Reading) -> None:
        """Send a request, a GET if `body` is None; `read` consumes the answer, and then the connection is closed."""
        try:
            method, json = ("GET", None) if body is None else ("POST", dict(body))
            async with self._http.stream(method, path, json=json) as answer:
                self.told[str(answer.status_code)] += 1
                await read(answer.aiter_bytes())
        except httpx2.TimeoutException:
            self.told[HUNG] += 1
        except httpx2.TransportError:
            self.told[CLOSED] += 1

    # ------------------------------------------------------------ bytes

    async def connect(self, do: Doing) -> None:
        """Run `do` on a plain connection. Count it if the gateway closes or refuses the connection."""
        host, port = self._address.hostname, self._address.port
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(self.patience_s):
                reader, writer = await asyncio.open_connection(host, port, local_addr=(ADDRESS, 0))
            await do(reader, writer)
        except TimeoutError:
            self.told[HUNG] += 1
        except (OSError, asyncio.IncompleteReadError):
            self.told[CLOSED] += 1
        finally:
            if writer is not None:
                writer.transport.abort()

    async def status_of(self, reader: asyncio.StreamReader) -> None:
        """Read the status of the next answer on a connection and count it."""
        async with asyncio.timeout(self.patience_s):
            line = await reader.readline()
        self.told[line.split(b" ")[1].decode() if line.startswith(b"HTTP/1.1 ") else CLOSED] += 1

    async def hold(self, reader: asyncio.StreamReader, seconds: float) -> None:
        """Keep an idle connection for `seconds`; count whether the gateway closes it."""
        try:
            async with asyncio.timeout(seconds):
                await reader.read(1)
        except TimeoutError:
            self.told[HELD] += 1
        else:
            self.told[CLOSED] += 1

    def head(self, method: str, path: str, *lines: str) -> bytes:
        """Return the head of a request without the empty line that ends it."""
        shown = [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([f"{method} {path} HTTP/1.1", f"host: {self._address.netloc}", *shown, *lines, ""]).encode()


def _status(status: int, body: Any) -> str:
    """Return an answer's status, with the error code of a fault, or a note if its error is not in the API's format."""
    if status < 400:
        return str(status)
    error = body.get("error") if isinstance(body, dict) else None
    if error is None:
        return f"{status} without an error in JSON"
    code = error.get("code") if isinstance(error, dict) else body.get("error_type")
    if "the gateway failed" in str(error):  # LoRAX's routes have one status for faults and for refused adapters
        code = "internal_error"
    return str(status) if str(status) in REFUSALS else f"{status} {code}"


Round = Callable[[Attacker], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Attack:
    """One kind of attack. Its round is repeated for the time of the attack."""

    name: str
    once: Round
    may_be_told: frozenset[str] = frozenset()  # statuses that are allowed besides `REFUSALS`
    keyless: bool = False  # the attack does not need an API key

    async def run(self, attacker: Attacker, seconds: float) -> int:
        """Repeat rounds for `seconds`, at least one; return their number."""
        until_s, num = time.monotonic() + seconds, 0
        while not num or time.monotonic() < until_s:
            await self.once(attacker)
            num += 1
        return num

    def wrongly_told(self, told: Mapping[str, int]) -> list[str]:
        """Return a message for each status that the attacker must not get."""
        allowed = REFUSALS | self.may_be_told
        return [f"the attacker was told {num} times: {what}" for what, num in told.items() if what not in allowed]


async def together(*rounds: Awaitable[Any]) -> None:
    """Run everything concurrently and wait until all of it is done."""
    await asyncio.gather(*rounds)
