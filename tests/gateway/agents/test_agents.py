"""What agents send is accepted, and its streams have what they go on with: a tool call, then the last answer.

The bodies are what the agents themselves sent in `make tour`, with short texts (`shapes.py`).
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
from helpers import anthropic_events, response_events
from helpers.scripted_fleet import Script, ScriptedFleet, make_model_folder, running_gateway

from protocol.queue.bus import Bus

HERE = Path(__file__).parent
DONE = "The note is corrected."
Answer = tuple[str, list[tuple[str, dict[str, Any]]], str, int]
"""The text of an answer, the names and arguments of its tool calls, why it ended, and how many tokens it has."""


@pytest_asyncio.fixture
async def http(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway whose model calls tools, and whose context holds an agent's prompt byte by byte."""
    folder = make_model_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text((HERE.parent / "templates" / "qwen.jinja").read_text())
    fleet.max_model_len = 200_000
    await fleet.register()
    async with running_gateway(bus, folder) as gateway, httpx2.AsyncClient(base_url=gateway.url, timeout=30) as client:
        yield client


def shape(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text())


def chat_answer(raw: bytes) -> Answer:
    """Return what a client of chat completions makes of a stream, which ends with [DONE], after its usage if asked."""
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
    """Return what a client of Anthropic's messages makes of a stream."""
    message = anthropic_events.built(anthropic_events.events_of(raw))
    blocks = message["content"]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    found = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    return text, found, message["stop_reason"], message["usage"]["output_tokens"]


def response_answer(raw: bytes) -> Answer:
    """Return what a client of Responses makes of a stream."""
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
    """Return the streamed answer to a body, which an agent sends with the headers and to the path of `sent`."""
    answer = await http.post(sent["path"], json=body, headers=sent["headers"])
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return READERS[sent["path"]](answer.content)


async def text_of(http: httpx2.AsyncClient, sent: dict[str, Any], body: dict[str, Any]) -> str:
    """Return the text of the answer to a body, streamed or whole, as the body has it."""
    if body.get("stream"):
        return (await asked(http, sent, body))[0]
    answer = await http.post(sent["path"], json=body, headers=sent["headers"])
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if "choices" in found:
        return found["choices"][0]["message"]["content"]
    parts = found["content"] if "content" in found else found["output"][-1]["content"]
    return "".join(part["text"] for part in parts)


async def goes_its_steps(
    http: httpx2.AsyncClient,
    fleet: ScriptedFleet,
    name: str,
    call: tuple[str, dict[str, Any]],
    reasons: tuple[str, str],
) -> None:
    """Give an agent the tool call that it asks for, then the answer to what its last call had besides."""
    sent = shape(name)
    for probe in sent["probes"]:
        assert (await http.request(*probe.split())).status_code == 200
    tool, arguments = call
    written = json.dumps({"name": tool, "arguments": arguments})
    fleet.script = lambda submit, body: Script(f"<tool_call>\n{written}\n</tool_call>", chunk=7)
    text, calls, reason, num_tokens = await asked(http, sent, sent["task"])
    assert (text.strip(), calls, reason) == ("", [call], reasons[0])
    assert num_tokens > 0  # agents count what is left of the context
    assert tool in fleet.prompt()  # its tools are shown to the model
    fleet.script = lambda submit, body: Script(DONE)
    text, calls, reason, num_tokens = await asked(http, sent, sent["task"] | sent["result"])
    assert (text, calls, reason) == (DONE, [], reasons[1])
    assert num_tokens > 0
    assert "<tool_response>" in fleet.prompt()  # and what they returned
    for aside in sent["asides"]:
        text = await text_of(http, sent, aside)
        assert text
        assert DONE.startswith(text)  # some ask for few tokens


async def test_claude_code(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    call = ("Edit", {"file_path": "/work/notes.txt", "old_string": "helo", "new_string": "hello"})
    await goes_its_steps(http, fleet, "claude_code", call, ("tool_use", "end_turn"))


async def test_codex(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    call = ("exec_command", {"cmd": "cat notes.txt"})
    await goes_its_steps(http, fleet, "codex", call, ("completed", "completed"))


async def test_qwen_code(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    call = ("edit", {"file_path": "/work/notes.txt", "old_string": "helo", "new_string": "hello"})
    await goes_its_steps(http, fleet, "qwen_code", call, ("tool_calls", "stop"))


async def test_opencode(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    call = ("edit", {"filePath": "/work/notes.txt", "oldString": "helo", "newString": "hello"})
    await goes_its_steps(http, fleet, "opencode", call, ("tool_calls", "stop"))


async def test_open_webui(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    call = ("correct", {"old": "helo", "new": "hello"})
    await goes_its_steps(http, fleet, "open_webui", call, ("tool_calls", "stop"))


async def test_inspect_ai(subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    answer = '{"name": "Paris", "is_capital": true}'
    fleet.script = lambda submit, body: Script(answer)
    for sent in json.loads((HERE / "inspect_ai.json").read_text()):
        with subtests.test(path=sent["path"], fields=sorted(sent["body"])):
            text = await text_of(http, sent, sent["body"])
            assert text
            assert answer.startswith(text)  # some ask for few tokens
