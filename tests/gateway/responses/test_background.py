"""Responses that outlive their client and their gateway: polled, resumed, cancelled, deleted, found by their key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
from helpers.response_events import Event, built, events_of, held_to
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until
from openai import AsyncOpenAI, NotFoundError
from pydantic import BaseModel

from protocol.queue.bus import Bus
from protocol.wire import messages as m
from tests.gateway.batches.test_batches import ended as batch_ended

TEXT = Script().text

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "base", "input": "hi", "max_output_tokens": 100, "background": True}


async def begun(http: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.post(PATH, json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    return held_to(answer.json())


async def reached(http: httpx2.AsyncClient, response_id: str, *states: str) -> dict[str, Any]:
    async def has_reached() -> dict[str, Any] | None:
        response = held_to((await http.get(f"{PATH}/{response_id}")).json())
        return response if response["status"] in states else None

    return await wait_until(has_reached, f"the response is {' or '.join(states)}")


async def read_until(http: httpx2.AsyncClient, url: str, num: int, **asked: Any) -> list[Event]:
    """Return the first `num` events of a stream that continues."""
    raw = b""
    async with http.stream(url=url, **asked) as answer:
        async for part in answer.aiter_raw():
            raw += part
            events = events_of(raw[: raw.rfind(b"\n\n") + 2])
            if len(events) >= num:
                return events[:num]
    raise AssertionError("the stream has ended")


async def test_a_response_is_polled_through_its_states(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.assigning.clear()
    fleet.script = lambda submit, body: Script(hold_after=3)
    response = await begun(http, metadata={"who": "me"})
    assert (response["status"], response["background"], response["output"]) == ("queued", True, [])
    assert (response["usage"], response["metadata"]) == (None, {"who": "me"})
    fleet.assigning.set()
    assert (await reached(http, response["id"], "in_progress"))["output"] == []
    fleet.go.set()
    done = await reached(http, response["id"], "completed")
    assert done["output"][0]["content"][0]["text"] == TEXT
    assert done["completed_at"] >= done["created_at"] == response["created_at"]
    assert done["usage"]["input_tokens_details"]["cached_tokens"] == 3
    short = await begun(http, max_output_tokens=4)
    assert (await reached(http, short["id"], "incomplete"))["output"][0]["status"] == "incomplete"
    job = (await http.get(f"/v1/jobs/{done['id']}")).json()
    assert (job["status"], job["endpoint"], job["result"]) == ("completed", PATH, done)


async def test_the_first_answer_says_queued_however_fast_a_worker_is(http: httpx2.AsyncClient) -> None:
    begins = [await begun(http) for _ in range(16)]
    assert [(response["status"], response["output"], response["completed_at"]) for response in begins] == [
        ("queued", [], None)
    ] * 16
    for response in begins:
        await reached(http, response["id"], "completed")


async def test_a_stream_is_resumed_at_another_gateway(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=6)
    async with gateway_client(bus, model_folder, grace_s=0.1) as http:  # the gateway stops before anything ends
        seen = await read_until(http, PATH, 7, method="POST", json={**BODY, "stream": True})
    assert [event["type"] for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    response_id = seen[0]["response"]["id"]
    fleet.go.set()
    async with gateway_client(bus, model_folder) as http:
        rest = await http.get(f"{PATH}/{response_id}", params={"stream": True, "starting_after": 6}, timeout=30)
        events = seen + events_of(rest.content)
        again = await http.get(f"{PATH}/{response_id}", params={"stream": True})
        response = built(events)
        assert (await http.get(f"{PATH}/{response_id}")).json() == response
    assert events_of(again.content) == events
    assert response["output"][0]["content"][0]["text"] == TEXT


async def test_a_followed_response_outlives_its_gateway(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=6)
    body, key = {**BODY, "background": False, "stream": True}, {"idempotency-key": "k"}
    async with gateway_client(bus, model_folder) as http:
        seen = await read_until(http, PATH, 6, method="POST", json=body, headers=key)
    fleet.go.set()
    async with gateway_client(bus, model_folder) as http:
        await reached(http, seen[0]["response"]["id"], "completed")
        again = events_of((await http.post(PATH, json=body, headers=key)).content)
    assert again[:6] == seen
    assert built(again)["output"][0]["content"][0]["text"] == TEXT


@pytest.mark.parametrize("hold", [0, 3])
async def test_a_response_is_cancelled_once(http: httpx2.AsyncClient, fleet: ScriptedFleet, hold: int) -> None:
    if hold:
        fleet.script = lambda submit, body: Script(hold_after=hold)
    else:
        fleet.assigning.clear()
    response = await begun(http)
    if hold:
        await reached(http, response["id"], "in_progress")
        await wait_until(lambda: fleet.seen, "a worker has it")
    cancelled = await fleet.cancel(http, response["id"])
    assert (cancelled["status"], cancelled["error"], cancelled["usage"]) == ("cancelled", None, None)
    assert (await http.post(f"{PATH}/{response['id']}/cancel")).json() == cancelled
    events = events_of((await http.get(f"{PATH}/{response['id']}", params={"stream": True})).content)
    assert (events[-1]["type"], events[-1]["response"]) == ("response.failed", cancelled)
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert TEXT.startswith(text)
    assert cancelled["output"] == [] if not text else cancelled["output"][0]["status"] == "incomplete"
    more = await http.post(PATH, json={**BODY, "previous_response_id": response["id"]})
    assert (more.status_code, more.json()["error"]["code"]) == (400, "previous_response_not_completed")


async def test_only_what_is_in_the_background_can_be_cancelled(http: httpx2.AsyncClient) -> None:
    response = (await http.post(PATH, json={**BODY, "background": False})).json()
    answer = await http.post(f"{PATH}/{response['id']}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_background")
    assert answer.headers["x-should-retry"] == "false"


async def test_a_deleted_response_leaves_nothing(http: httpx2.AsyncClient, bus: Bus, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(hold_after=3)
    response = await begun(http)
    gone = await http.delete(f"{PATH}/{response['id']}")
    assert gone.json() == {"id": response["id"], "object": "response", "deleted": True}
    fleet.go.set()
    for method, path in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
        answer = await http.request(method, f"{PATH}/{response['id']}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "response_not_found")
    call = response["id"].removeprefix("resp_")
    assert await bus._redis.keys(f"*{call}*") == []


async def test_a_key_finds_the_response_it_made(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    key = {"idempotency-key": "one"}
    first = (await http.post(PATH, json=BODY, headers=key)).json()
    done = await reached(http, first["id"], "completed")
    assert (await http.post(PATH, json=BODY, headers=key)).json() == done
    other = await http.post(PATH, json={**BODY, "input": "other"}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    body, key = {**BODY, "background": False}, {"idempotency-key": "two"}
    whole = (await http.post(PATH, json=body, headers=key)).json()
    assert (await http.post(PATH, json=body, headers=key)).json() == whole
    assert len(fleet.seen) == 2


async def test_other_tenants_find_nothing(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, api_keys=True) as http:
        secrets = [(await bus.api_keys.create(name, ("infer",)))[0] for name in ("mine", "other")]
        mine, other = ({"authorization": f"Bearer {secret}"} for secret in secrets)
        response = (await http.post(PATH, json={**BODY, "background": False}, headers=mine)).json()
        url, item = f"{PATH}/{response['id']}", response["output"][0]["id"]
        assert (await http.get(url, headers=mine)).status_code == 200
        for method, path in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
            assert (await http.request(method, url + path, headers=other)).status_code == 404
        assert (await http.get(url, params={"stream": True}, headers=other)).status_code == 404
        for fields, code in (
            ({"previous_response_id": response["id"]}, "previous_response_not_found"),
            ({"input": [{"type": "item_reference", "id": item}]}, "item_not_found"),
        ):
            answer = await http.post(PATH, json={**BODY, **fields}, headers=other)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
        job = (await http.post("/v1/chat/completions", headers=mine, json={
            "model": "base", "messages": [{"role": "user", "content": "hi"}], "background": True,
        })).json()  # fmt: skip
        assert (await http.get(f"{PATH}/{job['id']}", headers=mine)).status_code == 404


# ---------------------------------------------------------------- the official client


class Answer(BaseModel):
    p: str


async def test_the_official_client_drives_all_of_it(client: AsyncOpenAI, fleet: ScriptedFleet) -> None:
    responses = client.responses
    response = await responses.create(model="base", input="hi", max_output_tokens=100)
    assert response.output_text == TEXT
    background = await responses.create(model="base", input="hi", background=True)

    async def is_done() -> bool:
        return (await responses.retrieve(background.id)).status == "completed"

    await wait_until(is_done, "it has ended")
    numbers = [event.sequence_number async for event in await responses.retrieve(background.id, stream=True)]
    assert numbers == list(range(len(numbers)))
    rest = await responses.retrieve(background.id, stream=True, starting_after=4, include=[])
    assert [event.sequence_number async for event in rest] == numbers[5:]
    async with responses.stream(model="base", input="hi") as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(deltas) == final.output_text == TEXT
    async with responses.stream(response_id=background.id, starting_after=5) as stream:
        assert (await stream.get_final_response()).output_text == TEXT
    after = await responses.create(model="base", input="more", previous_response_id=response.id, max_output_tokens=9)
    items = [item async for item in responses.input_items.list(after.id, limit=1)]
    assert [item.type for item in items] == ["message"] * 3
    fleet.script = lambda submit, body: Script('{"p": "ö"}')
    parsed = await responses.parse(model="base", input="hi", text_format=Answer)
    assert parsed.output_parsed == Answer(p="ö")
    fleet.script = lambda submit, body: Script(hold_after=2)
    held = await responses.create(model="base", input="hi", background=True)
    fleet.go.set()
    assert (await responses.cancel(held.id)).status in ("cancelled", "completed")
    await responses.delete(held.id)
    with pytest.raises(NotFoundError):
        await responses.retrieve(held.id)


async def test_lines_of_a_batch_ask_for_responses(client: AsyncOpenAI, gateway: RunningGateway, bus: Bus) -> None:
    bodies = [{"model": "base", "input": "hi", "max_output_tokens": 9}, {"model": "base", "input": "hi", "store": True}]
    lines = [{"custom_id": str(i), "method": "POST", "url": PATH, "body": body} for i, body in enumerate(bodies)]
    raw = b"\n".join(map(orjson.dumps, lines))
    file = await client.files.create(file=("lines.jsonl", raw), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint=PATH, completion_window="24h")
    done = await batch_ended(client, batch)
    answer = orjson.loads((await client.files.content(done.output_file_id or "")).content)
    response = held_to(answer["response"]["body"])
    assert (response["status"], response["store"]) == ("incomplete", False)
    error = orjson.loads((await client.files.content(done.error_file_id or "")).content)
    assert error["response"]["body"]["error"]["param"] == "store"
    assert await bus._redis.keys(f"{bus.keys.tag}:job:*") == []


@pytest.mark.parametrize("is_gone", [False, True])
async def test_a_stream_that_was_kept_alive_goes_on_as_a_job(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, is_gone: bool
) -> None:
    """The adapter took longer than the ping interval, so the stream started before the background response existed."""
    await fleet.add_adapter("late", state="downloading")
    await bus.members.beat(bus.keys.store_beat("s1"), bus.keys.stores, "s1", b"http://nowhere", 3_600_000)
    body = {"model": "late", "input": "hi", "stream": True, "background": True}
    async with gateway_client(bus, model_folder, keepalive_s=0.05) as http:
        text = ""
        async with http.stream("POST", "/v1/responses", json=body) as answer:
            assert answer.status_code == 200
            async for part in answer.aiter_text():
                if not text:
                    state: m.AdapterState = "failed" if is_gone else "on_disk"
                    await fleet.add_adapter("late", "" if is_gone else "ab" * 32, state=state, reason="it is gone")
                    event = m.AdapterEvent(kind="alias", name="late")
                    await bus.adapters.announce(event)
                text += part
    if is_gone:
        assert "it is gone" in text
    else:
        assert text.startswith(":")
        assert "event: response.completed" in text
        assert text.rstrip().endswith("}")
