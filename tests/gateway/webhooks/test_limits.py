"""Webhook requests of a tenant are bounded, also if they are concurrent, with accurate errors."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from helpers.scripted_fleet import RunningGateway, ScriptedFleet, running_gateway
from helpers.waiting import wait_until

from chaos.dns_server import DnsServer, answering
from gateway.webhooks.endpoints import MAX_ENDPOINTS
from gateway.webhooks.sender import MAX_TESTS, MAX_TESTS_OF_TENANT
from protocol.queue.books.api_keys import Tenant
from protocol.queue.bus import Bus

HOOK = {"name": "n", "url": "https://a.example/hook", "event_types": ["job.failed"]}


@pytest_asyncio.fixture
async def gateway(bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    """A gateway with API keys, whose DNS server knows one name."""
    async with answering(DnsServer({"xn--bcher-kva.example": ["127.0.0.1"]})) as server:
        settings = {
            "data": tmp_path, "private_webhooks": True, "secret": "0123456789abcdef0123", "api_keys": True,
            "webhook_dns": server.address, "grace_s": 0.0,
        }  # fmt: skip
        async with running_gateway(bus, model_folder, **settings) as running:
            yield running


@asynccontextmanager
async def client_of(gateway: RunningGateway, bus: Bus, tenant: str) -> AsyncIterator[httpx2.AsyncClient]:
    await bus.api_keys.set_tenant(Tenant(name=tenant))
    headers = {"authorization": f"Bearer {(await bus.api_keys.create(tenant, ['infer']))[0]}"}
    limits = httpx2.Limits(max_connections=None)
    async with gateway.client(headers=headers, limits=limits) as http:
        yield http


@asynccontextmanager
async def receiving(status: str) -> AsyncIterator[str]:
    """Run a receiver that answers with a status, or not at all if it is empty; yield its address."""

    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        if status:
            writer.write(f"HTTP/1.1 {status}\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".encode())
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    try:
        yield f"{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:  # otherwise their clients, and so the gateway, would wait for an answer
            writer.close()


async def made(http: httpx2.AsyncClient, url: str) -> str:
    answer = await http.post("/v1/webhook_endpoints", json=HOOK | {"url": url})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def asked(http: httpx2.AsyncClient, id_: str) -> httpx2.Response:
    return await http.post(f"/v1/webhook_endpoints/{id_}/test", json={"event_type": "job.failed"})


async def test_endpoints_that_are_made_at_once_are_no_more(gateway: RunningGateway, bus: Bus) -> None:
    async with client_of(gateway, bus, "a") as http:
        answers = await asyncio.gather(*(http.post("/v1/webhook_endpoints", json=HOOK) for _ in range(40)))
        told = Counter(answer.status_code for answer in answers)
        assert told == {200: MAX_ENDPOINTS, 409: 40 - MAX_ENDPOINTS}
        assert any(f"limit of {MAX_ENDPOINTS}" in answer.text for answer in answers)
        assert len((await http.get("/v1/webhook_endpoints?limit=100")).json()["data"]) == MAX_ENDPOINTS


async def test_names_that_the_dns_cannot_have_are_refused(gateway: RunningGateway, bus: Bus) -> None:
    async with client_of(gateway, bus, "a") as http, receiving("204 No Content") as port:
        for url in ("https://🤖.example/", "https://a..b/", "https://127.1/", "https://" + "ü" * 300, "https://-a.b/"):
            answer = await http.post("/v1/webhook_endpoints", json=HOOK | {"url": url})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url"), url
        tested = await asked(http, await made(http, f"http://Bücher.example:{port}/hök"))
        assert (tested.status_code, tested.json()["status_code"], tested.json()["success"]) == (200, 204, True)


@pytest.mark.parametrize("status", ["307 Elsewhere", "404 None", "503 Busy", "101 Switching", "304 Same"])
async def test_a_test_succeeds_with_2xx_alone(gateway: RunningGateway, bus: Bus, status: str) -> None:
    async with client_of(gateway, bus, "a") as http, receiving(status) as port:
        tested = await asked(http, await made(http, f"http://127.0.0.1:{port}/"))
        assert tested.status_code == 200
        assert tested.json()["status_code"] == int(status[:3])
        assert tested.json()["success"] is False


async def test_tests_at_once_are_few_and_say_so(gateway: RunningGateway, bus: Bus) -> None:
    """Three hundred tests of endpoints that hang, by name or by receiver, use no more slots than documented."""
    async with client_of(gateway, bus, "a") as http, receiving("") as port:
        silent, hanging = await made(http, "http://silent.example/"), await made(http, f"http://127.0.0.1:{port}/")
        before = len(os.listdir("/proc/self/fd"))
        tests = [asyncio.create_task(asked(http, (silent, hanging)[number % 2])) for number in range(300)]
        await wait_until(lambda: sum(one.done() for one in tests) >= 300 - MAX_TESTS_OF_TENANT, "most are refused")
        answers = [one.result() for one in tests if one.done()]
        # A name that gets no DNS answer ends its test after 5 s with 400; then the next test may use the slot.
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) > 280
        assert all(answer.status_code in (400, 429) for answer in answers)
        assert f"the limits of this gateway are {MAX_TESTS_OF_TENANT} and {MAX_TESTS}" in refused[0].text
        assert int(refused[0].headers["retry-after"]) > 0
        async with client_of(gateway, bus, "b") as other, receiving("200 OK") as good:
            assert (await asked(other, await made(other, f"http://127.0.0.1:{good}/"))).json()["success"]
        # Both ends of each of the clients' own connections are included.
        assert len(os.listdir("/proc/self/fd")) - before < 2 * 300 + 50
        for one in tests:
            one.cancel()
        await asyncio.gather(*tests, return_exceptions=True)
