"""`/v1/responses`: whole, streamed and replayed answers match each other and the types of the official client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import msgspec
import pytest
from helpers.response_events import Event, built, events_of, held_to
from helpers.scripted_fleet import MAX_MODEL_LEN, Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from gateway.adapters.resolver import CallTarget
from gateway.auth.callers import EVERYBODY
from gateway.calls.parsed_call import CallOptions
from gateway.calls.resolve import ResolvedCall
from gateway.calls.size import RECORDS, TEXT_BYTES, WHOLE_TEXTS, WRITTEN_RECORDS, call_bytes
from gateway.calls.tokenize import Prompt, tokenize
from gateway.responses.items import items_of
from gateway.responses.response_bodies import ResponseRequest
from gateway.responses.response_parse import parse
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import WorkerLost

TEXT = Script().text
PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "base", "input": "hi", "max_output_tokens": 100}
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"p": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"p": "ö"}}\n</tool_call>'
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


async def whole(http: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    return held_to(answer.json())


async def streamed(http: httpx2.AsyncClient, body: dict[str, Any]) -> list[Event]:
    answer = await http.post(PATH, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_of(answer.content)


async def found(http: httpx2.AsyncClient, response_id: str) -> dict[str, Any]:
    answer = await http.get(f"{PATH}/{response_id}")
    assert answer.status_code == 200, answer.text
    return held_to(answer.json())


async def ended(http: httpx2.AsyncClient, response_id: str) -> dict[str, Any]:
    async def has_ended() -> dict[str, Any] | None:
        response = await found(http, response_id)
        return response if response["status"] not in ("queued", "in_progress") else None

    return await wait_until(has_ended, "the response has ended")


def same(response: dict[str, Any]) -> dict[str, Any]:
    """Return a response without the fields that differ between two calls."""
    items = [{key: item[key] for key in item if key not in ("id", "call_id")} for item in response["output"]]
    rest = {key: value for key, value in response.items() if key not in ("id", "created_at", "completed_at")}
    return {**rest, "output": items}


# ---------------------------------------------------------------- answers


async def test_an_answer_its_stream_and_what_is_kept_are_the_same(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    one, events = await whole(http, {**BODY, **LOGPROBS}), await streamed(http, {**BODY, **LOGPROBS})
    other = built(events)
    assert one["id"] != other["id"]
    assert same(one) == same(other)
    for response in (one, other):
        assert await found(http, response["id"]) == response
    num, prompt = len(fleet.tokenizer.encode(TEXT).ids) + 1, len(fleet.seen[0][1].prompt) // 4
    assert one["usage"] == {
        "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": num, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + num,
    }  # fmt: skip
    [message] = one["output"]
    [part] = message["content"]
    assert (part["text"], one["status"], message["status"]) == (TEXT, "completed", "completed")
    assert len(part["logprobs"]) == num - 1  # the end token is not part of the text
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode() == TEXT
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {2}


async def test_a_replay_has_the_same_bytes(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(chunk=4)
    raw = (await http.post(PATH, json={**BODY, **LOGPROBS, "stream": True})).content
    events = events_of(raw)
    response_id = events[0]["response"]["id"]
    again = await http.get(f"{PATH}/{response_id}", params={"stream": True})
    assert again.content == raw
    later = await http.get(f"{PATH}/{response_id}", params={"stream": True, "starting_after": 5})
    assert raw.endswith(later.content)
    assert events_of(later.content) == events[6:]
    past = await http.get(f"{PATH}/{response_id}", params={"stream": True, "starting_after": 10_000})
    assert (past.status_code, past.content) == (200, b"")


async def test_reasoning_text_and_calls_are_items(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}\n{CALL}")
    body = {**BODY, "tools": [TOOL], "max_output_tokens": 300, **LOGPROBS}
    events = await streamed(qwen, body)
    one, other = await whole(qwen, body), built(events)
    assert same(one) == same(other)
    assert await found(qwen, other["id"]) == other
    reasoning, message, *calls = one["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm.\n"}]
    assert message["content"][0]["text"] == "Let me see."
    shown = b"".join(bytes(entry["bytes"]) for entry in message["content"][0]["logprobs"]).decode()
    assert "Let me see." in shown
    assert "Hm" not in shown
    assert [(call["name"], call["arguments"]) for call in calls] == [("add", '{"p": "ö"}')] * 2
    assert len({call["call_id"] for call in calls}) == 2
    assert 0 < one["usage"]["output_tokens_details"]["reasoning_tokens"] < one["usage"]["output_tokens"]


async def test_an_answer_that_is_cut_off_is_incomplete(http: httpx2.AsyncClient) -> None:
    events = await streamed(http, {**BODY, "max_output_tokens": 5})
    assert events[-1]["type"] == "response.incomplete"
    response = built(events)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (response["output"][0]["status"], response["completed_at"]) == ("incomplete", None)
    assert same(await whole(http, {**BODY, "max_output_tokens": 5})) == same(response)


async def test_an_empty_answer_is_an_empty_message(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script("")
    response = built(await streamed(http, BODY))
    assert response["output"][0]["content"][0]["text"] == ""
    assert same(await whole(http, BODY)) == same(response)


async def test_a_failure_ends_the_stream_and_is_kept(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(error=WorkerLost("three workers died"))
    events = await streamed(http, BODY)
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert response["error"] == {"code": "server_error", "message": "three workers died"}
    assert (response["status"], response["output"][0]["status"]) == ("failed", "incomplete")
    assert await found(http, response["id"]) == response
    replay = await http.get(f"{PATH}/{response['id']}", params={"stream": True})
    assert events_of(replay.content) == events
    assert (await http.post(PATH, json=BODY)).status_code == 500


async def test_what_is_not_stored_is_not_found(http: httpx2.AsyncClient, bus: Bus) -> None:
    response = await whole(http, {**BODY, "store": False})
    assert response["store"] is False
    assert (await http.get(f"{PATH}/{response['id']}")).status_code == 404
    assert await bus._redis.keys("*job*") == []


# ---------------------------------------------------------------- counts


async def test_a_shortened_input_leaves_room_for_virtual_tokens(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    """An input that can't be shortened enough can't be counted either."""
    await fleet.add_adapter("soft", "d-soft", num_virtual=100)
    long = "q" * (MAX_MODEL_LEN - 100)
    for model, status in (("base", 200), ("soft", 400)):
        asked = {"model": model, "input": long, "truncation": "auto"}
        answers = [await http.post(path, json=asked) for path in (f"{PATH}/input_tokens", PATH)]
        assert [answer.status_code for answer in answers] == [status, status], [answer.text for answer in answers]


async def test_a_count_is_what_the_response_is_charged(http: httpx2.AsyncClient, qwen: httpx2.AsyncClient) -> None:
    first = await whole(http, BODY)
    conversation = (await http.post("/v1/conversations", json={"items": [{"role": "user", "content": "ä"}]})).json()
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} {'dog ' * 8}"} for i in range(15)]
    for client, fields in (
        (http, {"input": "hi", "instructions": "Be brief."}),
        (http, {"input": "go on", "previous_response_id": first["id"]}),
        (http, {"conversation": conversation["id"]}),
        (http, {"input": turns, "truncation": "auto"}),
        (qwen, {"input": "hi", "tools": [TOOL], "text": {"format": {"type": "text"}}}),
    ):
        counted = (await client.post(f"{PATH}/input_tokens", json={"model": "base", **fields})).json()
        assert counted["object"] == "response.input_tokens"
        used = await whole(client, {"model": "base", "max_output_tokens": 20, **fields})
        assert counted["input_tokens"] == used["usage"]["input_tokens"]
    longer = (await http.post(f"{PATH}/input_tokens", json={"model": "base", "input": "dog " * 3000})).json()
    assert longer["input_tokens"] > 3000  # although it is too long for a response
    most = await http.post(f"{PATH}/input_tokens", json={"model": "base", "input": "dog " * 200_000})
    assert (most.status_code, most.json()["error"]["param"]) == (400, "input")


# ---------------------------------------------------------------- conversations


async def test_a_conversation_goes_on_with_a_response(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    first = await whole(http, {**BODY, "instructions": "Be brief."})
    second = await whole(http, {**BODY, "input": "go on", "previous_response_id": first["id"]})
    assert fleet.prompt() == (
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{TEXT}<|im_end|>\n"
        "<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    )
    await http.delete(f"{PATH}/{first['id']}")  # responses don't depend on earlier ones
    third = await whole(http, {**BODY, "input": "and?", "previous_response_id": second["id"]})
    assert fleet.prompt().count("<|im_start|>") == 6
    items = (await http.get(f"{PATH}/{third['id']}/input_items", params={"order": "asc"})).json()
    assert [item["content"][0]["text"] for item in items["data"]] == ["hi", TEXT, "go on", TEXT, "and?"]
    assert len({item["id"] for item in items["data"]}) == 5
    paged: list[Any] = []
    page: dict[str, Any] = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {} if page["last_id"] is None else {"after": page["last_id"]}
        page = (await http.get(f"{PATH}/{third['id']}/input_items", params={"limit": 2, **after})).json()
        paged += page["data"]
    assert paged == items["data"][::-1]
    gone = await http.get(f"{PATH}/{third['id']}/input_items", params={"after": "msg_1"})
    assert gone.status_code == 404


async def test_an_item_that_is_given_twice_gets_two_ids(http: httpx2.AsyncClient) -> None:
    first = await whole(http, BODY)
    [said] = first["output"]
    again = [{"type": "item_reference", "id": said["id"]}, said, said]
    second = await whole(http, {**BODY, "input": again, "previous_response_id": first["id"]})
    ids: list[str] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"] and len(ids) < 10:
        after = {"after": ids[-1]} if ids else {}
        asked = {"limit": 1, "order": "asc", **after}
        page = (await http.get(f"{PATH}/{second['id']}/input_items", params=asked)).json()
        ids += [item["id"] for item in page["data"]]
    assert len(set(ids)) == len(ids) == 5
    assert ids[1] == said["id"]


async def test_results_of_calls_and_references_are_read(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(f"<think>\nHm.\n</think>\n\n{CALL}")
    body = {**BODY, "tools": [TOOL], "max_output_tokens": 300}
    first = await whole(qwen, body)
    reasoning, call = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "7"}
    fleet.script = lambda submit, body: Script()
    ways: list[dict[str, Any]] = [
        {"input": [result], "previous_response_id": first["id"]},
        {"input": [{"role": "user", "content": "hi"}, reasoning, call, result]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                   *({"type": "item_reference", "id": item["id"]} for item in first["output"]), result]},
    ]  # fmt: skip
    prompts = set[str]()
    for way in ways:
        await whole(qwen, {**body, **way})
        prompts.add(fleet.prompt())
    [prompt] = prompts
    assert "<tool_response>\n7\n</tool_response>" in prompt
    assert '{"name": "add", "arguments": {"p": "ö"}}' in prompt


@pytest.mark.parametrize("cut", [{"max_output_tokens": 66}, {"stop": "ö"}])
async def test_a_call_that_was_cut_off_is_left_out_of_the_next_prompt(
    qwen: httpx2.AsyncClient, fleet: ScriptedFleet, cut: dict[str, Any]
) -> None:
    conversation = (await qwen.post("/v1/conversations", json={})).json()["id"]
    fleet.script = lambda submit, body: Script(f"<think>\nHm.\n</think>\n\n{CALL}")
    body = {**BODY, "tools": [TOOL], "max_output_tokens": 300}
    first = await whole(qwen, {**body, **cut, "conversation": conversation})
    call = first["output"][-1]
    assert (call["type"], call["status"]) == ("function_call", "incomplete")
    assert call["arguments"] in '{"p": "ö'
    fleet.script = lambda submit, body: Script()
    said = {"role": "user", "content": "go on"}
    prompts = set[str]()
    for way in (
        {"input": [said], "previous_response_id": first["id"]},
        {"input": [said], "conversation": conversation},
        {"input": [{"role": "user", "content": "hi"}, *first["output"], said]},
    ):
        await whole(qwen, {**body, **way})
        prompts.add(fleet.prompt())
    [prompt] = prompts
    assert prompt.count('"add"') == 1  # its definition
    assert "<|im_start|>assistant\n" in prompt[: prompt.index("go on")]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "invalid JSON"}
    await whole(qwen, {**body, "input": [result], "previous_response_id": first["id"]})
    assert fleet.prompt().count('"add"') == 2


async def test_truncation_drops_the_earliest_messages(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} {'dog ' * 8}"} for i in range(15)]
    body = {**BODY, "input": turns, "instructions": "Be brief.", "max_output_tokens": 20}
    refused = await http.post(PATH, json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    response = await whole(http, {**body, "truncation": "auto"})
    assert response["truncation"] == "auto"
    prompt = fleet.prompt()
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "14 dog" in prompt
    assert "<|im_start|>user\n0 dog" not in prompt
    await fleet.register()
    too_long = await http.post(PATH, json={**body, "input": "dog " * 300, "truncation": "auto"})
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_truncation_leaves_room_for_the_answer(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    """A prompt of any length leaves the least room at least; of messages that fit alone none is dropped."""
    last = {"role": "user", "content": "go on"}
    for num in range(MAX_MODEL_LEN - 80, MAX_MODEL_LEN - 20, 5):
        turns = [{"role": "user", "content": "q" * num}, {"role": "assistant", "content": "a"}, last]
        for most, room in ((None, MAX_MODEL_LEN // 8), (60, 60), (10_000, MAX_MODEL_LEN // 2)):
            asked = {"model": "base", "input": turns, "truncation": "auto", "max_output_tokens": most}
            used = (await whole(http, asked))["usage"]["input_tokens"]
            assert MAX_MODEL_LEN - used >= room, (num, most)
    alone = {"model": "base", "input": "q" * (MAX_MODEL_LEN - 40), "truncation": "auto", "max_output_tokens": 200}
    assert (await whole(http, alone))["usage"]["input_tokens"] > MAX_MODEL_LEN - 40


async def test_tokens_that_come_with_a_failure_are_shown(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(error=WorkerLost("three workers died"), chunk=1000)
    raw = (await http.post(PATH, json={**BODY, "stream": True})).content
    events = events_of(raw)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == TEXT
    replay = await http.get(f"{PATH}/{events[0]['response']['id']}", params={"stream": True})
    assert replay.content == raw


# ---------------------------------------------------------------- limits


async def test_a_conversation_is_bounded(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, max_body_bytes=4000, max_messages=4) as http:
        first = await whole(http, {**BODY, "max_output_tokens": 3})
        long = [{"role": "user", "content": "😀" * 300}] * 3
        answer = await http.post(PATH, json={**BODY, "input": long})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "limit_exceeded")
        assert "the conversation has" in answer.text
        more = {"input": [{"role": "user", "content": "x"}] * 3, "previous_response_id": first["id"]}
        answer = await http.post(PATH, json={**BODY, **more})
        assert answer.status_code == 400
        assert "input has 5 items, including earlier ones; the limit is 4" in answer.text


async def test_what_is_kept_without_keys_is_bounded(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, tenant_bytes=20_000) as http:
        made: list[str] = []
        while (answer := await http.post(PATH, json=BODY)).status_code == 200:
            made.append(answer.json()["id"])
        assert 2 <= len(made) <= 10
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (429, "rate_limit_exceeded")
        assert "tenant public keeps " in error["message"]
        assert "its limit is 20000" in error["message"]
        assert (await http.post(PATH, json={**BODY, "background": True})).status_code == 429
        assert (await http.post(PATH, json={**BODY, "store": False})).status_code == 200  # nothing is stored
        await http.delete(f"{PATH}/{made[0]}")
        await whole(http, BODY)


class CountedFiles:
    """Files of a model whose template encodes each message as one token."""

    def __init__(self) -> None:
        self.num = 0
        self.template = None

    async def encode_chat(self, messages: list[Any], **_: Any) -> SimpleNamespace:
        self.num += 1
        return SimpleNamespace(ids=[0] * len(messages), opened=False, continued=False)


async def test_truncation_renders_a_few_times() -> None:
    request = ResponseRequest.model_validate({"model": "base", "truncation": "auto", "instructions": "Be brief."})
    items = items_of([{"role": "user", "content": "x"}] * 1000, "0" * 32, {})
    call = parse(request, EVERYBODY, Settings(), None, items)
    base = m.ServedModel("b", "b", "f", "tiny", 300, max_model_len=100, sites=[], created_ms=0)
    for max_len, num in ((100, 88), (2000, 1001)):  # an eighth is left for the answer
        files: Any = CountedFiles()
        target = CallTarget("b", "", files, vocab_size=300)
        resolved = ResolvedCall(call, msgspec.structs.replace(base, max_model_len=max_len), [target])
        [prompt] = (await tokenize(resolved)).prompts
        assert prompt.num_tokens == num
        assert files.num <= 12


def test_what_last_events_hold_is_charged() -> None:
    prompt = Prompt(CallTarget("", "", None, ""), b"", 1, 1000)  # type: ignore[arg-type]
    sampling = m.Sampling(num_logprobs=1)
    once, again = (
        call_bytes(CallOptions(sampling=sampling, stream=True, by_token=by_token), [prompt])
        for by_token in (False, True)
    )
    assert again - once == 1000 * (WHOLE_TEXTS * TEXT_BYTES + (WRITTEN_RECORDS - RECORDS) * m.logprob_record_bytes(1))
