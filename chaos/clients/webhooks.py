"""Webhooks under faults: a web server that checks every signature, refuses some events, and counts those delivered."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import orjson
from openai import InvalidWebhookSignatureError, OpenAI

from chaos.dns_server import DnsServer, answering
from chaos.fleet import until

logger = logging.getLogger(__name__)

EVENTS = (
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled", "job.completed", "job.failed",
    "response.completed", "response.incomplete", "response.failed", "response.cancelled",
)  # fmt: skip
HOST = "receiver.example"
"""Host name of the receiver, which only the driver's DNS server knows."""

REFUSED = 0.2
"""Share of deliveries that are answered with 503, so that they are sent again."""

MAX_REFUSALS = 2
"""Maximum refusals of one event: the driver waits for the third attempt only; the fourth comes minutes later."""


class Receiver:
    """Receives the webhooks of one tenant."""

    def __init__(self, seed: int, names: DnsServer) -> None:
        """seed: selects the deliveries to refuse. names: the DNS server that knows the receiver's host name."""
        self.names = names
        self.url = ""
        self.secret = ""  # key of the webhooks' signatures
        self.arrived: Counter[tuple[str, str]] = Counter()  # (type, id of the job or batch) -> accepted deliveries
        self.violations: list[str] = []
        self._rng = random.Random(f"{seed} webhooks")
        self._openai = OpenAI(api_key="none")
        self._events: dict[str, str] = {}  # webhook-id -> the event's data
        self._refused: Counter[str] = Counter()  # webhook-id -> number of refusals

    async def subscribe(self, url: str, key: str) -> None:
        """Subscribe to the ends of all jobs and batches of an API key. url: a gateway's URL."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        wanted = {"name": "chaos", "url": self.url, "event_types": list(EVENTS)}
        async with httpx2.AsyncClient(trust_env=False, headers=headers) as http:
            answer = await http.post(f"{url}/v1/webhook_endpoints", json=wanted)
        self.secret = answer.raise_for_status().json()["signing_secret"]

    async def missing(self, ended: set[tuple[str, str]], wait_s: float) -> set[tuple[str, str]]:
        """Wait until webhooks have reported everything in `ended`. Return the missing ones as (type, id)."""
        await until(lambda: ended <= self.arrived.keys(), wait_s)
        return ended - self.arrived.keys()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one webhook. A delivery broken off by a dying gateway does not count."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
            body = await reader.readexactly(int(headers["content-length"]))
            event = headers["webhook-id"]
            is_refused = self._rng.random() < REFUSED and self._refused[event] < MAX_REFUSALS
            self._refused[event] += is_refused
            status = "503 Busy" if is_refused else "200 OK"
            self._take(headers, body, is_counted=not is_refused)
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            logger.info("a webhook was cut off: %s", error)
        finally:
            writer.close()

    def _take(self, headers: dict[str, str], body: bytes, *, is_counted: bool) -> None:
        try:
            self._openai.webhooks.unwrap(body.decode(), headers, secret=self.secret)
        except InvalidWebhookSignatureError as error:
            self.violations.append(f"a webhook is not signed: {error}")
        event = orjson.loads(body)
        told = f"{event['type']} {event['data']['id']}"
        if self._events.setdefault(headers["webhook-id"], told) != told or event["id"] != headers["webhook-id"]:
            self.violations.append(f"{headers['webhook-id']} tells of {told} and of {self._events[event['id']]}")
        if is_counted:
            self.arrived[event["type"], event["data"]["id"]] += 1


@asynccontextmanager
async def receiving(seed: int) -> AsyncIterator[Receiver]:
    """Run a receiver on this machine, and a DNS server that knows only the receiver's name."""
    async with answering(DnsServer({HOST: ["127.0.0.1"]})) as names:
        receiver = Receiver(seed, names)
        server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
        receiver.url = f"http://{HOST}:{server.sockets[0].getsockname()[1]}/hook"
        async with server:
            yield receiver
