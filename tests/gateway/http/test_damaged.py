"""Stored objects that can't be parsed count against the limits of their tenant, who alone can delete them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from helpers.scripted_fleet import ScriptedFleet, running_gateway

from protocol.queue.books.api_keys import Tenant
from protocol.queue.bus import Bus
from protocol.runtime.free_space import size_of

Clients = tuple[httpx2.AsyncClient, httpx2.AsyncClient]
"""HTTP clients of the owner and of another tenant."""


@pytest_asyncio.fixture
async def clients(bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path) -> AsyncIterator[Clients]:
    settings = {"data": tmp_path, "secret": "0123456789abcdef0123", "api_keys": True}
    async with running_gateway(bus, model_folder, **settings) as gateway, AsyncExitStack() as stack:

        async def client_of(tenant: str) -> httpx2.AsyncClient:
            await bus.api_keys.set_tenant(Tenant(name=tenant))
            headers = {"authorization": f"Bearer {(await bus.api_keys.create(tenant, ['infer']))[0]}"}
            http = gateway.client(headers=headers)
            return await stack.enter_async_context(http)

        yield await client_of("owner"), await client_of("other")


async def deleted_by_its_owner_alone(clients: Clients, path: str) -> None:
    owner, other = clients
    assert (await owner.get(path)).json()["error"]["code"] == "record_unreadable"
    for method in ("GET", "DELETE"):
        assert (await other.request(method, path)).status_code == 404
    assert (await owner.delete(path)).status_code == 200
    assert (await owner.delete(path)).status_code == 404


@pytest.mark.parametrize("raw", [b"\xc1", b"\x81\xa4form\xcd\x03\xe8"], ids=["damaged", "newer"])
async def test_a_file_that_cannot_be_read_can_be_deleted(
    clients: Clients, bus: Bus, tmp_path: Path, raw: bytes
) -> None:
    place = tmp_path / "files"
    form = {"file": ("a.jsonl", b"{}"), "purpose": (None, "batch")}
    id_ = (await clients[0].post("/v1/files", files=form)).json()["id"]
    await bus._redis.set(bus.keys.file(id_), raw, keepttl=True)
    assert size_of(place) > 0
    await deleted_by_its_owner_alone(clients, f"/v1/files/{id_}")
    assert size_of(place) == 0
    assert (await bus._redis.hgetall(bus.keys.file_sizes("owner"))) == {b"sum": b"0"}


async def test_a_conversation_that_cannot_be_read_can_be_deleted(clients: Clients, bus: Bus) -> None:
    id_ = (await clients[0].post("/v1/conversations", json={})).json()["id"]
    await bus._redis.hset(bus.keys.conversation(id_), "b", b"\xc1")
    await deleted_by_its_owner_alone(clients, f"/v1/conversations/{id_}")


async def test_an_endpoint_that_cannot_be_read_can_be_deleted(clients: Clients, bus: Bus) -> None:
    asked = {"name": "n", "url": "https://a.example/hook", "event_types": ["job.failed"]}
    id_ = (await clients[0].post("/v1/webhook_endpoints", json=asked)).json()["id"]
    await bus._redis.hset(bus.keys.hooks("owner"), id_, b"\xc1")
    await deleted_by_its_owner_alone(clients, f"/v1/webhook_endpoints/{id_}")
