"""Webhooks with OpenAI's client: they arrive signed and at least once, or are given up and listed."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from helpers.scripted_fleet import BASE_NAME, RunningGateway, Script, ScriptedFleet, running_gateway
from helpers.waiting import wait_until
from openai import APIStatusError, AsyncOpenAI, InvalidWebhookSignatureError

from gateway.batches.run import BatchPace
from gateway.service import GatewayTimings
from gateway.webhooks.sender import MAX_AGE_MS, MAX_WAITING, SenderPace
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import WorkerLost

PACE = GatewayTimings(
    batches=BatchPace(poll_s=0.05), webhooks=SenderPace(poll_s=0.05, lease_s=1.0, first_retry_s=0.05)
)  # fmt: skip
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "background": True}


@dataclass
class Receiver:
    """A web server that receives webhooks, after refusing `refusals` of them."""

    url: str = ""
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    refusals: int = 0
    answer: str = "503 Busy"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.got.append((headers, body))
        status = "200 OK"
        if self.refusals:
            self.refusals -= 1
            status = self.answer
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?a=b"
    async with server:
        yield receiver


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as one:
        yield one


@pytest_asyncio.fixture
async def hooked(bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    """A gateway that may send webhooks to this machine."""
    settings = {"data": tmp_path, "private_webhooks": True, "secret": "0123456789abcdef0123"}
    async with running_gateway(bus, model_folder, PACE, **settings) as gateway:
        yield gateway


@pytest_asyncio.fixture
async def openai(hooked: RunningGateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{hooked.url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def post_job(openai: AsyncOpenAI) -> str:
    async with httpx2.AsyncClient(base_url=str(openai.base_url), timeout=60) as http:
        return (await http.post("chat/completions", json=CHAT)).json()["id"]


async def endpoint(openai: AsyncOpenAI, url: str, *events: Any) -> Any:
    return await openai.webhooks.create(name="mine", url=url, event_types=list(events))


async def test_the_end_of_a_batch_arrives_signed(openai: AsyncOpenAI, receiver: Receiver) -> None:
    made = await endpoint(openai, receiver.url, "batch.completed", "batch.failed")
    assert made.signing_secret.startswith("whsec_")
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": BASE_NAME, "prompt": "x"}}
    for text in (json.dumps(line), "{"):
        file = await openai.files.create(file=("in.jsonl", io.BytesIO(text.encode())), purpose="batch")
        await openai.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    await wait_until(lambda: len(receiver.got) == 2, "both have arrived")
    events = [
        openai.webhooks.unwrap(body.decode(), headers, secret=made.signing_secret) for headers, body in receiver.got
    ]
    batches = {batch.id: batch.status for batch in (await openai.batches.list()).data}
    assert {event.data.id: event.type for event in events} == {  # type: ignore[union-attr]
        id_: f"batch.{status}" for id_, status in batches.items()
    }
    assert {headers["host"] for headers, _ in receiver.got} == {receiver.url.split("/")[2]}
    headers, body = receiver.got[0]
    with pytest.raises(InvalidWebhookSignatureError):
        openai.webhooks.unwrap(body.decode() + " ", headers, secret=made.signing_secret)


async def test_ends_of_jobs_arrive_however_they_end(
    openai: AsyncOpenAI, receiver: Receiver, fleet: ScriptedFleet
) -> None:
    await endpoint(openai, receiver.url, "job.completed", "job.cancelled")
    done = await post_job(openai)
    fleet.script = lambda submit, body: Script(hold_after=1)
    cancelled = await post_job(openai)
    async with httpx2.AsyncClient(base_url=str(openai.base_url), timeout=60) as http:
        await http.post(f"jobs/{cancelled}/cancel")
    fleet.go.set()
    await wait_until(lambda: len(receiver.got) == 2, "both have arrived")
    events = [json.loads(body) for _, body in receiver.got]
    assert {event["data"]["id"]: event["type"] for event in events} == {
        done: "job.completed", cancelled: "job.cancelled"
    }  # fmt: skip
    assert all(event["id"] == headers["webhook-id"] for event, (headers, _) in zip(events, receiver.got, strict=True))


async def test_ends_of_responses_arrive_in_openai_s_words(
    openai: AsyncOpenAI, receiver: Receiver, fleet: ScriptedFleet
) -> None:
    ends = ("completed", "incomplete", "failed", "cancelled")
    made = await endpoint(openai, receiver.url, *(f"response.{end}" for end in ends))
    ids: dict[str, str] = {}
    await openai.responses.create(model="base", input="hi")  # not in the background, so there is no webhook
    for end in ends:
        fleet.script = {
            "failed": lambda submit, body: Script(error=WorkerLost("three workers died")),
            "cancelled": lambda submit, body: Script(hold_after=1),
        }.get(end, lambda submit, body: Script())
        tokens = 4 if end == "incomplete" else None
        response = await openai.responses.create(
            model="base", input="hi", background=True, max_output_tokens=tokens
        )  # fmt: skip
        ids[response.id] = f"response.{end}"
        if end == "cancelled":
            fleet.go.set()
            ids[response.id] = f"response.{(await openai.responses.cancel(response.id)).status}"
        await wait_until(lambda: len(receiver.got) == len(ids), f"that it is {end} has arrived")
    events = [
        openai.webhooks.unwrap(body.decode(), headers, secret=made.signing_secret) for headers, body in receiver.got
    ]
    assert {event.data.id: event.type for event in events} == ids  # type: ignore[union-attr]


async def test_what_is_refused_is_sent_again_with_the_same_id(openai: AsyncOpenAI, receiver: Receiver) -> None:
    await endpoint(openai, receiver.url, "job.completed")
    receiver.refusals = 3
    await post_job(openai)
    await wait_until(lambda: len(receiver.got) == 4, "the fourth attempt has arrived")
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


async def test_what_is_given_up_is_listed_and_sent_again(
    openai: AsyncOpenAI, hooked: RunningGateway, receiver: Receiver, bus: Bus
) -> None:
    made = await endpoint(openai, receiver.url, "job.completed")
    receiver.refusals, receiver.answer = 1, "302 Found\r\nLocation: http://127.0.0.1:1/"  # redirects are not followed
    old = m.Delivery(
        id="d", event="evt_1", endpoint=made.id, tenant="public", type="job.completed", subject="job_1",
        created_ms=now_ms() - MAX_AGE_MS - 1,
    )  # fmt: skip
    await bus.webhooks.add("public", [old], 1)
    async with hooked.client() as http:

        async def listed() -> list[dict[str, Any]]:
            return (await http.get("/v1/webhook_deliveries")).json()["data"]

        [given_up] = await wait_until(listed, "it was given up")
        assert (given_up["event_id"], given_up["attempts"], given_up["error"]) == (
            "evt_1", 1, "the endpoint answered 302"
        )  # fmt: skip
        assert (await http.post("/v1/webhook_deliveries/none/retry")).status_code == 404
        assert (await http.post("/v1/webhook_deliveries/d/retry")).json()["attempts"] == 0
        await wait_until(lambda: len(receiver.got) == 2, "it has arrived")
        assert await listed() == []


async def test_deliveries_that_wait_are_bounded_whatever_is_sent_again(
    openai: AsyncOpenAI, hooked: RunningGateway, receiver: Receiver, bus: Bus
) -> None:
    made = await endpoint(openai, receiver.url, "job.completed")

    def delivery(number: int) -> m.Delivery:
        return m.Delivery(
            id=f"d{number}", event=f"evt_{number}", endpoint=made.id, tenant="public", type="job.completed",
            subject=f"job_{number}", created_ms=now_ms(),
        )  # fmt: skip

    async with hooked.client() as http:

        async def retry(number: int) -> int:
            return (await http.post(f"/v1/webhook_deliveries/d{number}/retry")).status_code

        receiver.refusals = 1_000_000
        for number in range(MAX_WAITING):
            await bus.webhooks.add("public", [delivery(number)], MAX_WAITING)
            await bus.webhooks.later(delivery(number), now_ms() + 3_600_000)
        for number in (MAX_WAITING, MAX_WAITING + 1):
            await bus.webhooks.give_up("public", [delivery(number)])
        assert await retry(MAX_WAITING) == 429
        await bus.webhooks.done(delivery(0))
        assert [await retry(MAX_WAITING + number) for number in (0, 0, 1)] == [200, 404, 429]
        receiver.refusals = 0

        async def is_taken() -> bool:
            return await retry(MAX_WAITING + 1) == 200

        await wait_until(is_taken, "one has arrived, and what was sent again was counted once")
        await wait_until(
            lambda: {headers["webhook-id"] for headers, _ in receiver.got} >= {"evt_1000", "evt_1001"}, "both"
        )


async def test_endpoints_are_changed_tested_rotated_and_deleted(openai: AsyncOpenAI, receiver: Receiver) -> None:
    made = await endpoint(openai, receiver.url, "batch.completed")
    assert (await openai.webhooks.retrieve(made.id)).signing_secret_hint == f"whsec_…{made.signing_secret[-4:]}"
    changed = await openai.webhooks.update(made.id, name="other", event_types=["batch.failed"])
    assert (changed.name, changed.url, changed.event_types) == ("other", receiver.url, ["batch.failed"])
    rotated = await openai.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != made.signing_secret
    tested = await openai.webhooks.test(made.id, event_type="batch.failed")
    assert (tested.status_code, tested.success) == (200, True)
    [(headers, body)] = receiver.got
    for secret in (made.signing_secret, rotated.signing_secret):
        openai.webhooks.unwrap(body.decode(), headers, secret=secret)
    assert [one.id async for one in openai.webhooks.list()] == [made.id]
    assert "batch.completed" in (await openai.webhooks.event_types.list()).data
    assert (await openai.webhooks.delete(made.id)).deleted
    with pytest.raises(APIStatusError) as caught:
        await openai.webhooks.retrieve(made.id)
    assert (caught.value.status_code, caught.value.code) == (404, "webhook_endpoint_not_found")


async def test_what_an_endpoint_may_not_be(openai: AsyncOpenAI) -> None:
    async def refusal(**changes: Any) -> tuple[int, str | None]:
        asked: dict[str, Any] = {"name": "n", "url": "https://example.com", "event_types": ["job.failed"]}
        with pytest.raises(APIStatusError) as caught:
            await openai.webhooks.create(**asked | changes)
        return caught.value.status_code, caught.value.param

    assert await refusal(event_types=["video.completed"]) == (400, "event_types")
    assert await refusal(event_types=[]) == (400, "event_types")
    for url in ("ftp://a", "https://", "nothing", "https://u:p@a", "https://a:99999", "https://a/" + "x" * 3000):
        assert await refusal(url=url) == (400, "url"), url
    for _ in range(20):
        await endpoint(openai, "https://example.com", "job.failed")
    assert (await refusal())[0] == 409


async def test_a_second_gateway_sends_when_the_first_has_gone(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, tmp_path: Path, receiver: Receiver
) -> None:
    settings = {"data": tmp_path, "private_webhooks": True, "secret": "0123456789abcdef0123"}
    async with (
        running_gateway(bus, model_folder, PACE, **settings) as first,
        AsyncOpenAI(base_url=f"{first.url}/v1", api_key="any") as client,
    ):
        await endpoint(client, receiver.url, "job.completed")
    async with running_gateway(bus, model_folder, PACE, **settings) as second:
        async with AsyncOpenAI(base_url=f"{second.url}/v1", api_key="any") as client:
            await post_job(client)
        await wait_until(lambda: receiver.got, "it has arrived")
