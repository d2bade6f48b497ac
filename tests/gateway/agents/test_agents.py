"""Requests of agents are accepted, and the streams have what agents need: a tool call, then the final answer.

The bodies were sent by the agents themselves in `make tour`, with texts shortened (`shapes.py`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
import pytest_asyncio
from helpers import anthropic_events, examples, response_events
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, make_model_folder

from gateway.bodies.parameter_check import IGNORED_HEADER
from protocol.queue.bus import Bus

HERE = Path(__file__).parent
DONE = "The note is corrected."
Answer = tuple[str, list[tuple[str, dict[str, Any]]], str, int]
"""Text of an answer, names and arguments of its tool calls, finish reason, and number of tokens."""


@pytest_asyncio.fixture
async def http(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway whose model calls tools and has room for the prompt of an agent, one token per byte."""
    folder = make_model_folder(tmp_path / "model", (HERE.parent / "templates" / "qwen.jinja").read_text())
    fleet.max_model_len = 200_000
    await fleet.register()
    async with gateway_client(bus, folder) as client:
        yield client


def shape(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text())


def chat_answer(raw: bytes) -> Answer:
    """Return the answer in a stream of chat completions, which must end with [DONE], after usage if requested."""
    *lines, last = [line for line in raw.decode().split("\n\n") if line and not line.startswith(":")]
    assert last == "data: [DONE]"
    chunks = [orjson.loads(line.removeprefix("data: ")) for line in lines]
    text, reason, calls = "", "", {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        text += choice["delta"].get("content") or ""
        reason = choice["finish_reason"] or reason
        for part in choice["delta"].get("tool_calls") or ():
            call = calls.setdefault(part["index"], {"id": part.get("id"), "name": "", "arguments": ""})
            call["name"] += part["function"].get("name") or ""
            call["arguments"] += part["function"].get("arguments") or ""
    assert all(call["id"] for call in calls.values())
    found = [(call["name"], json.loads(call["arguments"])) for call in calls.values()]
    usage = chunks[-1].get("usage") or {}
    return text, found, reason, usage.get("completion_tokens", 0)


def message_answer(raw: bytes) -> Answer:
    """Return the answer in a stream of Anthropic's messages."""
    message = anthropic_events.built(anthropic_events.events_of(raw))
    blocks = message["content"]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    found = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    return text, found, message["stop_reason"], message["usage"]["output_tokens"]


def response_answer(raw: bytes) -> Answer:
    """Return the answer in a stream of Responses."""
    response = response_events.built(response_events.events_of(raw))
    items = response["output"]
    text = "".join(part["text"] for item in items if item["type"] == "message" for part in item["content"])
    calls = [item for item in items if item["type"] == "function_call"]
    assert all(call["call_id"] for call in calls)
    found = [(call["name"], json.loads(call["arguments"])) for call in calls]
    return text, found, response["status"], response["usage"]["output_tokens"]


READERS = {
    "/v1/chat/completions": chat_answer,
    "/v1/messages": message_answer,
    "/v1/messages?beta=true": message_answer,
    "/v1/responses": response_answer,
}


async def asked(http: httpx2.AsyncClient, sent: dict[str, Any], body: dict[str, Any]) -> Answer:
    """Return the streamed answer to a body that is sent with the path and headers of `sent`."""
    answer = await http.post(sent["path"], json=body, headers=sent["headers"])
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return READERS[sent["path"]](answer.content)


async def text_of(http: httpx2.AsyncClient, sent: dict[str, Any], body: dict[str, Any]) -> str:
    """Return the text of the answer to a body, streamed or not as the body says."""
    if body.get("stream"):
        return (await asked(http, sent, body))[0]
    answer = await http.post(sent["path"], json=body, headers=sent["headers"])
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if "choices" in found:
        return found["choices"][0]["message"]["content"]
    parts = found["content"] if "content" in found else found["output"][-1]["content"]
    return "".join(part["text"] for part in parts)


EDIT = {"old_string": "helo", "new_string": "hello"}
STEPS: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "claude_code": ("Edit", {"file_path": "/work/notes.txt", **EDIT}, ("tool_use", "end_turn")),
    "codex": ("exec_command", {"cmd": "cat notes.txt"}, ("completed", "completed")),
    "opencode": ("edit", {"filePath": "/w", "oldString": "helo", "newString": "hello"}, ("tool_calls", "stop")),
    "qwen_code": ("edit", {"file_path": "/work/notes.txt", **EDIT}, ("tool_calls", "stop")),
    "open_webui": ("correct", {"old": "helo", "new": "hello"}, ("tool_calls", "stop")),
}
"""Agent -> the tool that it is asked to call, what with, and why its two answers end."""


@pytest.mark.parametrize("name", examples.some(STEPS, "claude_code", "codex", "opencode"))
async def test_an_agent_calls_its_tool_and_reads_the_result(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, name: str
) -> None:
    """Answer an agent with the tool call it expects, then with a text after the result of the tool."""
    sent = shape(name)
    for probe in sent["probes"]:
        assert (await http.request(*probe.split())).status_code == 200
    tool, arguments, reasons = STEPS[name]
    written = json.dumps({"name": tool, "arguments": arguments})
    fleet.script = lambda submit, body: Script(f"<tool_call>\n{written}\n</tool_call>", chunk=7)
    text, calls, reason, num_tokens = await asked(http, sent, sent["task"])
    assert (text.strip(), calls, reason) == ("", [(tool, arguments)], reasons[0])
    assert num_tokens > 0  # agents compute the remaining context from it
    assert tool in fleet.prompt()  # its tools are shown to the model
    fleet.script = lambda submit, body: Script(DONE)
    text, calls, reason, num_tokens = await asked(http, sent, sent["task"] | sent["result"])
    assert (text, calls, reason) == (DONE, [], reasons[1])
    assert num_tokens > 0
    assert "<tool_response>" in fleet.prompt()  # and the results of the tools
    for aside in sent["asides"]:
        text = await text_of(http, sent, aside)
        assert text
        assert DONE.startswith(text)  # some requests limit the tokens


# ---------------------------------------------------------------- content that text models can't read

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
STAND_IN = "[image: this model reads text]"
PARTS: dict[str, dict[str, Any]] = {
    "/v1/responses": {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "high"},
    "/v1/messages": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
    "/v1/chat/completions": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
}
"""Path -> an image in the format of its API."""


def with_result(path: str, body: dict[str, Any], parts: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return a body whose last tool result consists of `parts`, and the name of that field."""
    body = json.loads(json.dumps(body))
    if path == "/v1/responses":
        i = max(i for i, item in enumerate(body["input"]) if item["type"] == "function_call_output")
        body["input"][i]["output"] = parts
        return body, f"input[{i}].output"
    if path == "/v1/messages":
        of_user = [(i, one["content"]) for i, one in enumerate(body["messages"]) if one["role"] == "user"]
        i = max(i for i, content in of_user if content[0]["type"] == "tool_result")
        body["messages"][i]["content"][0]["content"] = parts
        return body, f"messages[{i}].content[0].content"
    i = max(i for i, one in enumerate(body["messages"]) if one["role"] == "tool")
    body["messages"][i]["content"] = parts
    return body, f"messages[{i}].content"


async def test_an_image_that_a_tool_has_found_ends_no_session(
    subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    """As returned by Codex's view_image, Claude Code's Read of a picture, and tools of MCP servers."""
    fleet.script = lambda submit, body: Script(DONE)
    for name in ("codex", "claude_code", "qwen_code", "opencode"):
        with subtests.test(agent=name):
            sent = shape(name)
            path = sent["path"].partition("?")[0]
            text = {"type": "input_text" if path == "/v1/responses" else "text", "text": "a picture"}
            body, place = with_result(path, sent["task"] | sent["result"], [text, PARTS[path]])
            answer = await http.post(sent["path"], json=body, headers=sent["headers"])
            assert answer.status_code == 200, answer.text
            assert f"{place}[1] ({PARTS[path]['type']})" in answer.headers[IGNORED_HEADER].split(", ")
            assert READERS[path](answer.content)[0] == DONE
            assert f"a picture{STAND_IN}" in fleet.prompt().replace("\n", "")
            assert PIXEL not in fleet.prompt()


async def test_an_image_alone_is_a_result(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    """Also on routes that only count tokens: the image is replaced with a stand-in text there, too."""
    fleet.script = lambda submit, body: Script(DONE)
    call = {"type": "function_call", "call_id": "c", "name": "view_image", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": [PARTS["/v1/responses"]]}
    asked = {"model": "base", "input": [call, output]}
    made = await http.post("/v1/responses", json=asked)
    assert made.status_code == 200, made.text
    assert STAND_IN in fleet.prompt()
    kept = (await http.get(f"/v1/responses/{made.json()['id']}/input_items?order=asc")).json()["data"]
    assert kept[1]["output"] == [{"type": "input_text", "text": STAND_IN}]
    counted = await http.post("/v1/responses/input_tokens", json=asked)
    assert counted.json()["input_tokens"] == made.json()["usage"]["input_tokens"]
    assert counted.headers[IGNORED_HEADER] == "input[1].output[0] (input_image)"
    used = {"type": "tool_use", "id": "t", "name": "Read", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [PARTS["/v1/messages"]]}
    messages = [{"role": "user", "content": "see"}, {"role": "assistant", "content": [used]},
                {"role": "user", "content": [result]}]  # fmt: skip
    counted = await http.post("/v1/messages/count_tokens", json={"model": "base", "messages": messages})
    assert counted.status_code == 200, counted.text
    assert counted.headers[IGNORED_HEADER] == "messages[2].content[0].content[0] (image)"
    document = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PIXEL}}
    beside = [{**result, "content": "read"}, document]  # like Claude Code's Read of a PDF
    messages[2] = {"role": "user", "content": beside}
    answer = await http.post("/v1/messages", json={"model": "base", "max_tokens": 99, "messages": messages})
    assert answer.status_code == 200, answer.text
    assert answer.headers[IGNORED_HEADER] == "messages[2].content[1] (document)"
    assert "[document: this model reads text]" in fleet.prompt()
    call = {"id": "c", "type": "function", "function": {"name": "see", "arguments": "{}"}}
    chat = [{"role": "user", "content": "see"}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": [PARTS["/v1/chat/completions"]]}]  # fmt: skip
    counted = await http.post("/tokenize", json={"model": "base", "messages": chat})
    assert counted.status_code == 200, counted.text
    assert counted.headers[IGNORED_HEADER] == "messages[2].content[0] (image_url)"
    call = {"function": {"name": "see", "arguments": {}}}
    chat = [{"role": "user", "content": "see"}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_name": "see", "content": "seen", "images": [PIXEL]}]  # fmt: skip
    answer = await http.post("/api/chat", json={"model": "base", "messages": chat, "stream": False})
    assert answer.status_code == 200, answer.text
    assert answer.headers[IGNORED_HEADER] == "messages[2].images"
    assert f"seen\n{STAND_IN}" in fleet.prompt()


async def test_what_a_user_shows_is_still_refused(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    """The answer about the text could be taken for one about the picture; invalid parts of results are refused, too."""
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    for path, field in (("/v1/responses", "input"), ("/v1/messages", "messages"), ("/v1/chat/completions", "messages")):
        body: dict[str, Any] = {"model": "base", field: [{"role": "user", "content": [PARTS[path]]}]}
        answer = await http.post(path, json=body if path == "/v1/responses" else {**body, "max_tokens": 4})
        assert answer.status_code == 400, answer.text
        assert "this model accepts text only" in answer.json()["error"]["message"]
    for part in ({"type": "video"}, {"type": ["input_image"]}, {"type": {}}, {}, 3, None):
        output = {"type": "function_call_output", "call_id": "c", "output": [part]}
        answer = await http.post("/v1/responses", json={"model": "base", "input": [call, output]})
        assert answer.status_code == 400, (part, answer.text)
        chat = [{"role": "user", "content": "see"}, {"role": "tool", "tool_call_id": "c", "content": [part]}]
        answer = await http.post("/v1/chat/completions", json={"model": "base", "messages": chat})
        assert answer.status_code == 400, (part, answer.text)
    assert fleet.seen == []


@pytest.mark.thorough
async def test_inspect_ai(subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    answer = '{"name": "Paris", "is_capital": true}'
    fleet.script = lambda submit, body: Script(answer)
    for sent in json.loads((HERE / "inspect_ai.json").read_text()):
        with subtests.test(path=sent["path"], fields=sorted(sent["body"])):
            text = await text_of(http, sent, sent["body"])
            assert text
            assert answer.startswith(text)  # some requests limit the tokens
