"""`/v1/conversations` and responses that continue one: turns are neither lost nor duplicated."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.response_events import built, events_of, held_to
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, running_gateway
from helpers.waiting import wait_until
from openai import AsyncOpenAI, NotFoundError
from openai.types.conversations import Conversation, ConversationItem
from pydantic import TypeAdapter

from gateway.service import GatewayTimings
from protocol.queue.bus import Bus
from protocol.queue.kept.conversations import MAX_TURNS
from protocol.wire.errors import WorkerLost
from tests.gateway.batches.test_batches import ended as batch_ended

TEXT = Script().text

PATH, RESPONSES = "/v1/conversations", "/v1/responses"
USER = {"role": "user", "content": "hi"}
_ITEM: TypeAdapter[Any] = TypeAdapter(ConversationItem)

Json = dict[str, Any]


async def made(http: httpx2.AsyncClient, **fields: Any) -> str:
    answer = await http.post(PATH, json=fields)
    assert answer.status_code == 200, answer.text
    return Conversation.model_validate(answer.json()).id


async def items_in(http: httpx2.AsyncClient, conversation: str) -> list[Json]:
    """Return the items of a conversation, the oldest first, after a check against the types of the official client."""
    answer = await http.get(f"{PATH}/{conversation}/items", params={"order": "asc", "limit": 100})
    assert answer.status_code == 200, answer.text
    page = answer.json()
    assert not page["has_more"]
    for item in page["data"]:
        _ITEM.validate_python(item)
    assert len({item["id"] for item in page["data"]}) == len(page["data"])
    return page["data"]


def texts(items: list[Json]) -> list[str]:
    return [item["content"][0]["text"] for item in items]


async def asked(http: httpx2.AsyncClient, conversation: str, text: str = "go on", **fields: Any) -> Json:
    body = {"model": "base", "input": text, "conversation": conversation, "max_output_tokens": 100, **fields}
    answer = await http.post(RESPONSES, json=body)
    assert answer.status_code == 200, answer.text
    return held_to(answer.json())


async def ended(http: httpx2.AsyncClient, response_id: str) -> Json:
    async def has_ended() -> Json | None:
        response = (await http.get(f"{RESPONSES}/{response_id}")).json()
        return response if response["status"] not in ("queued", "in_progress") else None

    return await wait_until(has_ended, "the response has ended")


async def is_running(http: httpx2.AsyncClient, response_id: str) -> None:
    async def runs() -> bool:
        return (await http.get(f"{RESPONSES}/{response_id}")).json()["status"] == "in_progress"

    await wait_until(runs, "the response runs")


# ---------------------------------------------------------------- turns


async def test_a_turn_is_added_and_gone_on_with(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    conversation = await made(http, items=[{"role": "system", "content": "Be brief."}, USER])
    first = await asked(http, conversation, instructions="Now.")
    assert first["conversation"] == {"id": conversation}
    items = await items_in(http, conversation)
    assert texts(items) == ["Be brief.", "hi", "go on", TEXT]
    assert items[3] == first["output"][0]
    second = await asked(http, conversation, "and?", max_output_tokens=5)
    assert fleet.prompt() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n"
        f"<|im_start|>assistant\n{TEXT}<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second["status"] == "incomplete"
    items = await items_in(http, conversation)
    assert (len(items), items[5]) == (6, second["output"][0])
    inputs = (await http.get(f"{RESPONSES}/{second['id']}/input_items", params={"order": "asc"})).json()["data"]
    assert inputs == items[:5]
    body = {"model": "base", "conversation": {"id": conversation}, "stream": True, "max_output_tokens": 100}
    whole = built(events_of((await http.post(RESPONSES, json=body)).content))  # without input
    assert whole["conversation"] == {"id": conversation}
    assert (await items_in(http, conversation))[6:] == whole["output"]


async def test_results_of_calls_go_on_with_a_conversation(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"p": "ö"}}\n</tool_call>'
    tool = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"p": {}}}}
    fleet.script = lambda submit, body: Script(f"<think>\nHm.\n</think>\n\n{call}")
    conversation = await made(qwen)
    first = await asked(qwen, conversation, "hi", tools=[tool], max_output_tokens=300)
    items = await items_in(qwen, conversation)
    assert [item["type"] for item in items] == ["message", "reasoning", "function_call"]
    fleet.script = lambda submit, body: Script()
    result = {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "7"}
    answer = await qwen.post(RESPONSES, json={"model": "base", "input": "hi", "conversation": conversation})
    assert "no function_call_output" in answer.json()["error"]["message"]
    body = {"model": "base", "input": [result], "conversation": conversation, "max_output_tokens": 50}
    assert (await qwen.post(RESPONSES, json=body)).status_code == 200
    assert "<tool_response>\n7\n</tool_response>" in fleet.prompt()
    items = await items_in(qwen, conversation)
    assert [item["type"] for item in items[3:]] == ["function_call_output", "message"]


async def test_references_to_its_items_are_new_items(http: httpx2.AsyncClient) -> None:
    conversation = await made(http, items=[USER])
    [item] = await items_in(http, conversation)
    given = [{"type": "item_reference", "id": item["id"]}, {**USER, "id": item["id"]}]
    await asked(http, conversation, given)  # type: ignore[arg-type]
    assert texts(await items_in(http, conversation)) == ["hi", "hi", "hi", TEXT]


async def test_a_turn_outlives_its_gateway(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=6)
    async with gateway_client(bus, model_folder) as http:
        conversation = await made(http)
        response = await asked(http, conversation, background=True)
        await is_running(http, response["id"])
        assert await items_in(http, conversation) == []
    fleet.go.set()
    async with (
        running_gateway(bus, model_folder) as second,
        running_gateway(bus, model_folder) as third,
        second.client() as http,
        third.client() as other,
    ):
        done = await ended(http, response["id"])
        both = await asyncio.gather(*(items_in(one, conversation) for one in (http, other) * 4))
        assert both == [both[0]] * 8
        assert texts(both[0]) == ["go on", TEXT]
        assert both[0][1] == done["output"][0]


@pytest.mark.parametrize("how", ["failed", "cancelled", "deleted"])
async def test_what_has_no_answer_adds_nothing(http: httpx2.AsyncClient, fleet: ScriptedFleet, how: str) -> None:
    failure = WorkerLost("three workers died") if how == "failed" else None
    fleet.script = lambda submit, body: Script(error=failure, hold_after=None if failure else 3)
    conversation = await made(http, items=[USER])
    response = await asked(http, conversation, background=True)
    if how == "cancelled":
        await is_running(http, response["id"])
        await fleet.cancel(http, response["id"])  # the worker's next step is refused
    if how == "deleted":
        await http.delete(f"{RESPONSES}/{response['id']}")
        fleet.go.set()
    else:
        assert (await ended(http, response["id"]))["status"] == how
    assert texts(await items_in(http, conversation)) == ["hi"]
    fleet.script = lambda submit, body: Script()
    await asked(http, conversation)
    assert texts(await items_in(http, conversation)) == ["hi", "go on", TEXT]


async def test_responses_at_once_are_all_added_whole(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(hold_after=2)
    conversation = await made(http, items=[USER])
    names = [f"number {i}" for i in range(6)]
    begun = [await asked(http, conversation, name, background=True) for name in names]
    for response in begun:
        await is_running(http, response["id"])
    prompts = [fleet.prompt(i) for i in range(6)]
    assert all(prompt.count("<|im_start|>user") == 2 for prompt in prompts)  # no prompt includes another turn
    fleet.go.set()
    reading = asyncio.gather(*(items_in(http, conversation) for _ in range(10)))
    done = [await ended(http, response["id"]) for response in begun]
    await reading
    items = await items_in(http, conversation)
    turns = [(items[i]["content"][0]["text"], items[i + 1]) for i in range(1, 13, 2)]
    assert len(items) == 13
    assert sorted(name for name, _ in turns) == names
    assert all((name, response["output"][0]) in turns for name, response in zip(names, done, strict=True))


async def test_too_many_responses_at_once_are_told_to_wait(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.assigning.clear()
    conversation = await made(http)
    for _ in range(MAX_TURNS):
        await asked(http, conversation, background=True)
    body = {"model": "base", "input": "hi", "conversation": conversation, "background": True}
    refused = await http.post(RESPONSES, json=body)
    assert refused.status_code == 429
    assert f"{MAX_TURNS} responses of this conversation" in refused.json()["error"]["message"]
    assert f"the limit is {MAX_TURNS}" in refused.json()["error"]["message"]
    assert "retry-after" in refused.headers
    assert (await http.delete(f"{PATH}/{conversation}")).status_code == 200  # its responses continue without it
    fleet.assigning.set()


async def test_a_key_makes_one_turn(http: httpx2.AsyncClient) -> None:
    conversation = await made(http)
    for background in (False, True):
        body = {"model": "base", "input": "hi", "conversation": conversation, "background": background}
        key = {"idempotency-key": f"k{background}"}
        answers = [(await http.post(RESPONSES, json=body, headers=key)).json() for _ in range(2)]
        assert answers[0]["id"] == answers[1]["id"]
        assert answers[1]["conversation"] == {"id": conversation}
        await ended(http, answers[0]["id"])
    assert texts(await items_in(http, conversation)) == ["hi", TEXT] * 2


async def test_a_turn_stays_when_its_response_is_deleted(http: httpx2.AsyncClient) -> None:
    conversation = await made(http)
    for path in (RESPONSES, "/v1/jobs"):
        response = await asked(http, conversation)
        assert (await http.delete(f"{path}/{response['id']}")).status_code == 200
    assert texts(await items_in(http, conversation)) == ["go on", TEXT] * 2


async def test_turns_that_nobody_reads_are_swept_in(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    timings = GatewayTimings(conversation_sweep_s=0.05)
    fleet.script = lambda submit, body: Script(hold_after=3)
    async with (
        running_gateway(bus, model_folder, timings) as gateway,
        running_gateway(bus, model_folder, timings),
        gateway.client() as http,
    ):
        conversation, gone = await made(http), await made(http)
        for one in (conversation, gone):
            await asked(http, one, background=True)
        await http.delete(f"{PATH}/{gone}")

        async def is_put_off() -> bool:
            scores = [score for _, score in await bus._redis.zrange(bus.keys.turns, 0, -1, withscores=True)]
            return len(scores) == 1 and scores[0] > 0

        async def are_due() -> None:
            for member in await bus._redis.zrange(bus.keys.turns, 0, -1):
                await bus._redis.zadd(bus.keys.turns, {member: 0})

        await are_due()
        await wait_until(is_put_off, "the running one is looked at again, that of a deleted conversation is not")
        fleet.go.set()

        async def is_added() -> bool:
            await are_due()
            return len(await bus.conversations.items(conversation)) == 2

        await wait_until(is_added, "the turn is added")
        assert await bus.conversations.turns(conversation) == []
        assert not await bus._redis.exists(bus.keys.turns)


# ---------------------------------------------------------------- clients


async def test_the_official_client_drives_conversations(client: AsyncOpenAI) -> None:
    conversations = client.conversations
    one = await conversations.create(items=[{"role": "user", "content": "hi"}], metadata={"a": "b"})
    assert (await conversations.retrieve(one.id)).metadata == {"a": "b"}
    assert (await conversations.update(one.id, metadata={"c": "d"})).metadata == {"c": "d"}
    assert (await conversations.update(one.id, metadata=None)).metadata == {}
    added = await conversations.items.create(
        one.id, items=[{"role": "user", "content": str(i)} for i in range(4)], include=["message.output_text.logprobs"]
    )
    assert [item.id for item in added.data] == [item.id async for item in conversations.items.list(one.id)][3::-1]
    listed = [item async for item in conversations.items.list(one.id, order="asc", limit=2)]
    assert [item.content[0].text for item in listed if item.type == "message"] == ["hi", "0", "1", "2", "3"]  # type: ignore[union-attr]
    item = await conversations.items.retrieve(listed[1].id or "", conversation_id=one.id)
    assert item == listed[1]
    assert (await conversations.items.delete(listed[1].id or "", conversation_id=one.id)).id == one.id
    with pytest.raises(NotFoundError):
        await conversations.items.retrieve(listed[1].id or "", conversation_id=one.id)
    response = await client.responses.create(model="base", input="more", conversation=one.id)
    assert response.conversation is not None
    assert response.conversation.id == one.id
    assert response.output_text == TEXT
    assert len([item async for item in conversations.items.list(one.id, limit=1)]) == 6
    gone = await conversations.delete(one.id)
    assert (gone.id, gone.object, gone.deleted) == (one.id, "conversation.deleted", True)
    with pytest.raises(NotFoundError):
        await conversations.retrieve(one.id)
    assert (await client.conversations.create()).metadata == {}


async def test_other_tenants_find_no_conversation(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, api_keys=True) as http:
        secrets = [(await bus.api_keys.create(name, ("infer",)))[0] for name in ("mine", "other")]
        mine, other = ({"authorization": f"Bearer {secret}"} for secret in secrets)
        conversation = (await http.post(PATH, json={"items": [USER]}, headers=mine)).json()["id"]
        url = f"{PATH}/{conversation}"
        item = (await http.get(f"{url}/items", headers=mine)).json()["data"][0]["id"]
        routes: list[tuple[str, str, Json | None]] = [
            ("GET", "", None), ("POST", "", {"metadata": {}}), ("GET", "/items", None), ("GET", f"/items/{item}", None),
            ("POST", "/items", {"items": [USER]}), ("DELETE", f"/items/{item}", None), ("DELETE", "", None),
        ]  # fmt: skip
        for method, path, body in routes:
            answer = await http.request(method, url + path, json=body, headers=other)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "conversation_not_found")
        body = {"model": "base", "input": "hi", "conversation": conversation}
        answer = await http.post(RESPONSES, json=body, headers=other)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "conversation_not_found")
        assert answer.json()["error"]["param"] == "conversation"
        assert (await http.post(RESPONSES, json=body, headers=mine)).status_code == 200
        assert len((await http.get(f"{url}/items", headers=mine)).json()["data"]) == 3


REFUSED: list[tuple[str, Json, int, str | None, str | None]] = [
    (PATH, {"items": [USER] * 21}, 400, "items", "limit_exceeded"),
    (PATH, {"items": [{"role": "king", "content": "x"}]}, 400, "items[0].role", None),
    (PATH, {"items": [{"type": "item_reference", "id": "msg_1"}]}, 400, "items[0].type", None),
    (PATH, {"items": [{"type": "web_search_call", "id": "x"}]}, 400, "items[0].type", None),
    (PATH, {"metadata": {"a": "x" * 513}}, 400, "metadata", None),
    (PATH, {"metdata": {}}, 400, "metdata", "unknown_parameter"),
    (f"{PATH}/conv_1", {"metadata": {}}, 404, "conversation_id", "conversation_not_found"),
    (f"{PATH}/ID", {}, 400, "metadata", None),
    (f"{PATH}/ID/items", {"items": []}, 400, "items", None),
    (f"{PATH}/ID/items", {}, 400, "items", None),
    (f"{PATH}/ID/items?include[]=file_search_call.results", {"items": [USER]}, 400, "include", None),
    (RESPONSES, {"conversation": "conv_1"}, 404, "conversation", "conversation_not_found"),
    (RESPONSES, {"conversation": f"conv_{'0' * 32}:items"}, 404, "conversation", "conversation_not_found"),
    (RESPONSES, {"conversation": 5}, 400, "conversation", None),
    (RESPONSES, {"conversation": {"id": "ID", "name": "x"}}, 400, "conversation.name", "unknown_parameter"),
    (RESPONSES, {"conversation": "ID", "previous_response_id": "resp_1"}, 400, "conversation",
     "mutually_exclusive_parameters"),
    (RESPONSES, {"conversation": "ID", "store": False}, 400, "store", None),
    (RESPONSES, {"conversation": "ID", "input": None}, 400, "input", None),
    (RESPONSES, {"conversation": "ID", "input": []}, 400, "input", None),
]  # fmt: skip


async def test_wrong_conversations_are_named(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    known = await made(http)
    for path, fields, status, param, code in REFUSED:
        body = {"model": "base", "input": "hi", **fields} if path == RESPONSES else fields
        given = {name: known if value == "ID" else value for name, value in body.items()}
        answer = await http.post(path.replace("ID", known), json=given)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code), (path, fields, error)
    for path in ("/items?limit=0", "/items?order=up", "/items?limit=101"):
        assert (await http.get(f"{PATH}/{known}{path}")).status_code == 400
    assert (await http.get(f"{PATH}/{known}/items?after=msg_1")).status_code == 404
    assert (await http.get(f"{PATH}/{known}/items/msg_1")).json()["error"]["code"] == "item_not_found"
    assert (await http.get(PATH)).status_code == 405
    assert fleet.seen == []


async def test_no_line_of_a_batch_is_a_turn(client: AsyncOpenAI) -> None:
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"model": "base", "input": "hi",'
    line += b' "conversation": "conv_1"}}'
    file = await client.files.create(file=("lines.jsonl", line), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint=RESPONSES, completion_window="24h")
    done = await batch_ended(client, batch)
    assert b'"param":"conversation"' in (await client.files.content(done.error_file_id or "")).content


# ---------------------------------------------------------------- limits


async def test_conversations_are_bounded(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    limits: Json = {"max_messages": 4, "max_body_bytes": 20_000, "tenant_conversations": 3, "tenant_bytes": 40_000}
    async with gateway_client(bus, model_folder, **limits) as http:

        async def refused(status: int, words: str, path: str, **body: Any) -> None:
            answer = await http.post(path, json=body)
            assert answer.status_code == status, answer.text
            assert words in answer.json()["error"]["message"], answer.text

        one = await made(http, items=[USER] * 3)
        items = f"{PATH}/{one}/items"
        await refused(400, "has 3 items and this would add 2; the limit is 4", items, items=[USER] * 2)
        await refused(400, "5 items, including earlier ones; the limit is 4", RESPONSES, model="base",
                      input=[USER] * 2, conversation=one)  # fmt: skip
        long = {"role": "user", "content": "x" * 12_000}
        two = await made(http, items=[long])
        await refused(400, "it would exceed 20000", f"{PATH}/{two}/items", items=[long])
        three = await made(http, items=[long])
        await refused(429, "you have 3 conversations; the limit is 3", PATH)
        await http.delete(f"{PATH}/{one}")
        await refused(429, "tenant public keeps ", PATH, items=[long])
        await refused(429, "its limit is 40000", PATH, items=[long])
        [item] = await items_in(http, three)
        await http.delete(f"{PATH}/{three}/items/{item['id']}")  # deleted items no longer count
        await made(http, items=[long])


async def test_conversations_expire_and_leave_nothing(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, conversation_ttl_s=200_000.0) as http:
        conversation = await made(http, items=[USER])
        held = [bus.keys.conversation(conversation), bus.keys.conversation_items(conversation),
                bus.keys.conversation_order(conversation)]  # fmt: skip
        for key in held:
            await bus._redis.expire(key, 50)
        response = await asked(http, conversation, background=True)  # a response extends the life of its conversation
        for key in (*held, bus.keys.conversation_turns(conversation)):
            assert await bus._redis.pttl(key) > 190_000_000
        assert await bus.untimed_keys() == []
        await ended(http, response["id"])
        await items_in(http, conversation)
        await http.delete(f"{PATH}/{conversation}")
        await http.delete(f"{RESPONSES}/{response['id']}")
        assert await bus._redis.keys("*conv*") == []
        assert await bus._redis.zscore(bus.keys.kept("public"), "sum") in (None, 0)
