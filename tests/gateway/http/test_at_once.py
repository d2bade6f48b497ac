"""Tokens are sent directly by the task that delivers them, without waking the task of the call."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest
from helpers.openai_events import text_of
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet
from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from protocol.wire import messages as m

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 60}
COMPLETION = {"model": "base", "prompt": "hi", "stream": True, "max_tokens": 60}
SAMPLE = Script()


def waiters() -> set[asyncio.Future[Any]]:
    """Return the futures for which the tasks of calls wait now; a task that has been woken waits for a new one."""
    tasks = [task for task in asyncio.all_tasks() if "run_asgi" in str(task.get_coro())]
    return {task._fut_waiter for task in tasks}  # type: ignore[attr-defined]


async def follow(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str, asked: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[set[asyncio.Future[Any]]]]:
    """Produce the default script's tokens one by one, each after the client has read the one before.

    Returns the events, and for each the futures for which the tasks of calls then waited.
    """
    events: list[dict[str, Any]] = []
    waited: list[set[asyncio.Future[Any]]] = []
    fleet.assigning.clear()
    fleet.seen.clear()

    async def read() -> None:
        async with http.stream("POST", path, json=asked) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line.removeprefix("data: ")))

    async with asyncio.TaskGroup() as group:
        group.create_task(read())
        await wait_until(lambda: fleet.seen, "it is queued")
        submit, body = fleet.seen[0]
        order = m.Assigned(submit.rid, 1, "", "base", submit.gateway)
        await fleet.bus.assign(fleet.wid, [(order, 0)])
        ids, _ = fleet.tokens(SAMPLE, body)
        shown = 0
        for i, id_ in enumerate(ids):
            is_last = i == len(ids) - 1
            assert await fleet.step(order, i, [id_], body, end="stop" if is_last else "")
            visible = len(fleet.tokenizer.decode(ids[: i + 1]).rstrip("\ufffd"))
            if visible > shown and not asked.get("stop") and not is_last:
                shown = visible
                await wait_until(lambda: len(text_of(events)) >= visible, "it is read")  # noqa: B023
                waited.append(waiters())
    fleet.assigning.set()
    return events, waited


@pytest.mark.parametrize("usage", [{}, {"include_usage": True, "continuous_usage_stats": True}])
async def test_a_stream_s_task_sleeps_between_its_first_token_and_its_end(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, usage: dict[str, bool]
) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        events, waited = await follow(http, fleet, path, {**body, "stream_options": usage})
        assert text_of(events) == SAMPLE.text
        assert len(waited) > 10
        assert all(waiting == waited[0] for waiting in waited)
        told = [event["usage"]["completion_tokens"] for event in events if event.get("usage")]
        num_tokens = len(fleet.tokens(SAMPLE, fleet.seen[0][1])[0])
        assert told == sorted(told)
        assert told[-1:] == ([num_tokens] if usage else [])
        assert len(set(told)) > (10 if usage else -1)


async def test_stop_strings_and_logprobs_are_as_in_the_whole_answer(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    asked = {**COMPLETION, "stop": ["you"], "logprobs": 2}
    events, _ = await follow(http, fleet, "/v1/completions", asked)
    [whole] = (await http.post("/v1/completions", json={**asked, "stream": False})).json()["choices"]
    assert text_of(events) == whole["text"] == SAMPLE.text.partition("you")[0]
    choices = [choice for event in events for choice in event["choices"] if choice["logprobs"]]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for choice in choices for value in choice["logprobs"][field]] == whole["logprobs"][field]


async def test_who_leaves_between_two_tokens_is_cancelled(
    bus: Bus, gateway: RunningGateway, fleet: ScriptedFleet
) -> None:
    fleet.script = lambda submit, body: Script(text="x " * 40, eos=False, hold_after=3)
    async with (
        gateway.client() as http,
        http.stream("POST", "/v1/completions", json=COMPLETION) as answer,
    ):
        await anext(answer.aiter_lines())
    fleet.go.set()

    async def is_over() -> bool:
        [facts] = await bus.requests([fleet.seen[0][0].rid])
        return facts is not None and facts.state == "cancelled"

    await wait_until(is_over, "it is cancelled")
