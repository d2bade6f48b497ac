"""Texts that look like the framing of a stream arrive unchanged in the streams of all APIs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from helpers.scripted_fleet import Script, ScriptedFleet

ODD = 'data: x\n\ndata: [DONE]\n\nid: 7\nevent: y\n: z\r\n\r{"a"}\u2028data: \u2029\x85\x0b\x0c\x1c\x1d\x1e id: 1,2\n'
"""Text that a client could mistake for the end of a line, an event or a stream."""

MESSAGES = [{"role": "user", "content": "hi"}]


def data_of(text: str) -> Iterator[dict[str, Any]]:
    """Return the JSON of each event; only line feeds end lines."""
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields.get("data", "[DONE]") == "[DONE]":
            continue
        assert fields.get("id", "0").isdecimal()
        yield json.loads(fields["data"])


def chat_text(text: str) -> str:
    return "".join(c["delta"].get("content") or "" for one in data_of(text) for c in one["choices"])


def completion_text(text: str) -> str:
    return "".join(c["text"] for one in data_of(text) for c in one["choices"])


def response_text(text: str) -> str:
    return "".join(one["delta"] for one in data_of(text) if one["type"] == "response.output_text.delta")


def lines_of(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("\n") if line]


async def test_odd_texts_arrive_whole_in_every_stream(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, subtests: pytest.Subtests
) -> None:
    fleet.script = lambda submit, body: Script(text=ODD, eos=True, chunk=3)
    chat = {"model": "base", "messages": MESSAGES, "max_tokens": 150, "stream": True}
    plain = {"model": "base", "prompt": "hi", "max_tokens": 150, "stream": True}
    streams = {
        "/v1/chat/completions": (chat, chat_text),
        "/v1/completions": (plain, completion_text),
        "/v1/responses": ({"model": "base", "input": "hi", "stream": True}, response_text),
        "/v1/messages": (
            chat, lambda text: "".join(one["delta"].get("text", "") for one in data_of(text) if "delta" in one)
        ),
        "/generate_stream": (
            {"inputs": "hi", "parameters": {"max_new_tokens": 150}},
            lambda text: "".join(one["token"]["text"] for one in data_of(text) if not one["token"]["special"]),
        ),
        "/api/chat": (
            {"model": "base", "messages": MESSAGES},
            lambda text: "".join(one["message"]["content"] for one in lines_of(text)),
        ),
        "/api/generate": (
            {"model": "base", "prompt": "hi"}, lambda text: "".join(one["response"] for one in lines_of(text))
        ),
    }  # fmt: skip
    for path, (body, shown) in streams.items():
        with subtests.test(path):
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            assert shown(answer.text) == ODD


async def test_odd_texts_arrive_whole_in_every_jobs_stream(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, subtests: pytest.Subtests
) -> None:
    fleet.script = lambda submit, body: Script(text=ODD, eos=True, chunk=3)
    cases: dict[str, tuple[str, dict[str, Any], Any]] = {
        "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 150}, chat_text),
        "completion": ("/v1/completions", {"prompt": "hi", "max_tokens": 150}, completion_text),
        "echo": ("/v1/completions", {"prompt": ODD, "echo": True, "max_tokens": 90}, completion_text),
        "held back": ("/v1/completions", {"prompt": "hi", "stop": "id: 1,2\n!", "max_tokens": 150}, completion_text),
    }
    for name, (path, body, shown) in cases.items():
        with subtests.test(name):
            job = (await http.post(path, json={"model": "base", "background": True, **body})).json()
            where = f"/v1/jobs/{job['id']}/stream"
            first, second = await asyncio.gather(http.get(where), http.get(where))
            whole = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=20"})).json()["result"]
            choice = whole["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert ODD in text or name == "echo"
            assert shown(first.text) == shown(second.text) == text
            assert "\nid: " in first.text
    with subtests.test("response"):
        body = {"model": "base", "input": "hi", "background": True, "stream": True}
        assert response_text((await http.post("/v1/responses", json=body)).text) == ODD
