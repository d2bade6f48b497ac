"""Tokens that are sent by whoever delivers them, so that the call's task sleeps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet
from helpers.waiting import wait_until

from gateway.calls.follow import Generation
from gateway.openai.write import CompletionWriter

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMPLETION = {"model": "base", "prompt": "hi", "stream": True}


async def events_of(answer: httpx2.Response, fleet: ScriptedFleet) -> AsyncIterator[dict[str, Any]]:
    """Make a stream's events; the worker goes on once the first token has been read, so that its call waits again."""
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            yield event
            if event["choices"] and (
                event["choices"][0].get("text") or event["choices"][0].get("delta", {}).get("content")
            ):
                fleet.go.set()


def text_of(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@pytest.fixture
def num_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have an entry for each time that a call's task has waited."""
    waits: list[float] = []
    advance = Generation.advance

    async def counted(generation: Generation, timeout_s: float) -> Any:
        waits.append(timeout_s)
        return await advance(generation, timeout_s)

    monkeypatch.setattr(Generation, "advance", counted)
    return waits


@pytest.mark.parametrize(
    "usage", [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
async def test_a_stream_wakes_its_call_at_its_beginning_and_its_end(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, num_waits: list[float], usage: dict[str, bool]
) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        fleet.go.clear()
        fleet.script = lambda submit, body: Script(hold_after=1)
        num_waits.clear()
        body = {**body, "max_tokens": 60, "stream_options": usage}
        async with http.stream("POST", path, json=body) as answer:
            events = [event async for event in events_of(answer, fleet)]
        assert text_of(events) == Script().text
        assert len(num_waits) == 2
        num_tokens = len(fleet.tokens(Script(), fleet.seen[-1][1])[0])
        assert len(events) > num_tokens // 2
        told = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
        assert told[-1:] == ([num_tokens] if usage else [])
        if "continuous_usage_stats" in usage:
            assert told == sorted(told)
            assert len(set(told)) > num_tokens // 2


async def test_stop_strings_and_logprobs_are_as_in_the_whole_answer(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, num_waits: list[float]
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=1)
    body = {**COMPLETION, "stop": ["you"], "logprobs": 2, "max_tokens": 60}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        events = [event async for event in events_of(answer, fleet)]
    assert len(num_waits) == 2
    [whole] = (await http.post("/v1/completions", json={**body, "stream": False})).json()["choices"]
    assert text_of(events) == whole["text"] == Script().text.partition("you")[0]
    choices = [choice for event in events for choice in event["choices"] if choice["logprobs"]]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for choice in choices for value in choice["logprobs"][field]] == whole["logprobs"][field]


async def test_choices_of_one_call_are_sent_as_their_tokens_come(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, num_waits: list[float]
) -> None:
    fleet.script = lambda submit, body: Script(text=f"{submit.choice}: {Script().text}", hold_after=1)
    async with http.stream("POST", "/v1/completions", json={**COMPLETION, "n": 3, "max_tokens": 60}) as answer:
        events = [event async for event in events_of(answer, fleet)]
    for i in range(3):
        own = [{"choices": [c for c in event["choices"] if c["index"] == i]} for event in events]
        assert text_of(own) == f"{i}: {Script().text}"
    assert len(num_waits) < 10


async def test_a_failure_while_writing_ends_one_stream_and_no_other(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=1)
    frames = CompletionWriter.frames

    def failing(writer: CompletionWriter, piece: Any) -> bytes:
        if "w" in piece.text:
            raise ValueError("a fault of ours")
        return frames(writer, piece)

    monkeypatch.setattr(CompletionWriter, "frames", failing)
    raw: list[str] = []

    async def other() -> str:
        async with http.stream("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 60}) as answer:
            return text_of([event async for event in events_of(answer, fleet)])

    async with asyncio.TaskGroup() as group:
        others = [group.create_task(other()) for _ in range(3)]
        async with http.stream("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 60}) as answer:
            raw = [line async for line in answer.aiter_lines()]
    assert [other.result() for other in others] == [Script().text] * 3
    assert "[DONE]" not in "".join(raw)
    assert json.loads([line for line in raw if line][-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "a fault of ours" in caplog.text


async def test_who_leaves_between_two_tokens_is_cancelled(gateway: RunningGateway, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(text="x " * 40, eos=False, hold_after=3)
    body = {**COMPLETION, "max_tokens": 80}
    async with (
        httpx2.AsyncClient(base_url=gateway.url) as http,
        http.stream("POST", "/v1/completions", json=body) as it,
    ):
        await anext(it.aiter_lines())
    fleet.go.set()

    async def is_over() -> bool:
        [facts] = await fleet.bus.requests([fleet.seen[0][0].rid])
        return facts is not None and facts.state == "cancelled"

    await wait_until(is_over, "it is cancelled")
