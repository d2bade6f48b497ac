"""Stored responses and jobs of another release are reported as unreadable and affect nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import orjson
import pytest
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, running_gateway
from helpers.waiting import wait_until

from gateway.jobs.jobs import Facts
from gateway.overload.large import Checks
from gateway.responses.conversations import Conversations
from gateway.responses.items import Item
from gateway.responses.stored import StoredResponses
from gateway.service import GatewayTimings
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.backoff import Backoff
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from tests.gateway.responses.test_conversations import RESPONSES, TEXT, asked, items_in, made, texts

OLDER = {
    "no fields": lambda kept: {},
    "another name": lambda kept: {**kept, "shown": {**kept["shown"], "tool_choice": {"type": "of before"}}},
    "a field less": lambda kept: {name: value for name, value in kept.items() if name != "shown"},
    "no items": lambda kept: {name: value for name, value in kept.items() if name not in ("items", "num_own")},
    "another type": lambda kept: {**kept, "shown": 7},
    "a value that is refused": lambda kept: {**kept, "shown": {**kept["shown"], "max_output_tokens": -5}},
    "a list": lambda kept: [],
}  # fmt: skip
"""Possible earlier formats of a response's record, derived from the current one."""


async def rewrite(bus: Bus, jid: str, change: Any) -> None:
    kept = orjson.loads(await bus._redis.hget(bus.keys.job(jid), "request"))
    await bus._redis.hset(bus.keys.job(jid), "request", orjson.dumps(change(kept)))


async def test_a_response_of_an_older_release_adds_nothing_and_stops_nothing(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, subtests: pytest.Subtests
) -> None:
    timings = GatewayTimings(conversation_sweep_s=0.02)
    fleet.script = lambda submit, body: Script(hold_after=3)
    async with (
        running_gateway(bus, model_folder, timings) as gateway,
        gateway.client() as http,
    ):
        turns: dict[str, tuple[str, str]] = {}
        for name, change in OLDER.items():
            conversation = await made(http)
            response = (await asked(http, conversation, background=True))["id"]
            await rewrite(bus, response, change)
            turns[name] = (conversation, response)
        good = await made(http)
        await asked(http, good, background=True)
        fleet.go.set()

        async def are_added() -> bool:
            for member in await bus._redis.zrange(bus.keys.turns, 0, -1):
                await bus._redis.zadd(bus.keys.turns, {member: 0})
            return not await bus._redis.exists(bus.keys.turns)

        await wait_until(are_added, "no turn is due any more")
        assert texts(await items_in(http, good)) == ["go on", TEXT]
        for name, (conversation, response) in turns.items():
            with subtests.test(record=name):
                part = "/input_items" if name == "no items" else ""  # only needed for the response
                answer = await http.get(f"{RESPONSES}/{response}{part}")
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "record_unreadable")
                assert await items_in(http, conversation) == []
                later = await asked(http, conversation, "again")
                assert later["status"] == "completed", "the conversation goes on"
        assert not gateway.task.done()


@pytest.mark.parametrize("raw", [b"", b"{", b"7", b"[]", b"{}", b"\xff", b"[" * 2000])
async def test_an_item_that_cannot_be_read_is_said_to_be(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, raw: bytes
) -> None:
    async with gateway_client(bus, model_folder) as http:
        conversation = await made(http)
        path = f"/v1/conversations/{conversation}/items"
        item = {"role": "user", "content": "hi"}
        item_id = (await http.post(path, json={"items": [item]})).json()["data"][0]["id"]
        await bus._redis.hset(bus.keys.conversation_items(conversation), item_id, raw)
        for one in (path, f"{path}/{item_id}"):
            answer = await http.get(one)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "record_unreadable")
        assert (await http.delete(f"{path}/{item_id}")).status_code == 200
        assert (await http.get(path)).json()["data"] == []


async def test_a_job_that_cannot_be_read_hides_no_other(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient
) -> None:  # fmt: skip
    jobs: list[str] = []
    for _ in range(3):
        answer = await http.post("/v1/completions", json={"model": "base", "prompt": "a", "background": True})
        jobs.append(answer.json()["id"])
    for jid in jobs:
        await http.get(f"/v1/jobs/{jid}", params={"wait": 10})
    await rewrite(bus, jobs[0], lambda kept: {**kept, "max_tokens": "of before"})
    await bus._redis.hset(bus.keys.job(jobs[1]), "b", b"\xc1")
    for jid in jobs[:2]:
        answer = await http.get(f"/v1/jobs/{jid}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "record_unreadable")
    listed = (await http.get("/v1/jobs")).json()
    assert {job["id"] for job in listed["data"]} == {jobs[0], jobs[2]}
    assert (await http.get(f"/v1/jobs/{jobs[2]}")).json()["status"] == "completed"


class Breaking(StoredResponses):
    """Fails with an unexpected error at one response."""

    def __init__(self, broken: str) -> None:
        self.broken = broken
        self.tried = 0

    async def turn(self, job: m.Job, facts: Facts) -> list[Item]:
        if job.jid == self.broken:
            self.tried += 1
            raise ZeroDivisionError
        return [{"id": f"item_of_{job.jid}", "type": "message"}]


async def test_a_turn_that_fails_unforeseen_is_given_up_and_others_are_added(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:  # fmt: skip
    """Its conversation is not blocked for ever: after eight tries, it continues without the turn."""
    fleet.script = lambda submit, body: Script(hold_after=3)
    async with gateway_client(bus, model_folder, GatewayTimings(conversation_sweep_s=1000)) as http:
        one, other = await made(http), await made(http)
        broken, whole = [(await asked(http, of, background=True))["id"] for of in (one, other)]
        fleet.go.set()
        for response in (broken, whole):
            await http.get(f"/v1/jobs/{response}", params={"wait": 10})
        stored = Breaking(broken)
        jobs: Any = SimpleNamespace()
        conversations = Conversations(
            bus, Settings(redis_url=bus.url), jobs, stored, Checks(), retry=Backoff(0.0001, 0.0001)
        )  # fmt: skip

        async def is_over() -> bool:
            for member in await bus._redis.zrange(bus.keys.turns, 0, -1):
                await bus._redis.zadd(bus.keys.turns, {member: now_ms() - 1})
            await conversations.add_due_turns()
            return not await bus._redis.exists(bus.keys.turns)

        await wait_until(is_over, "no turn is due any more")
        assert stored.tried == 8
        assert await bus.conversations.items(one) == []
        assert [orjson.loads(item)["id"] for item in await bus.conversations.items(other)] == [f"item_of_{whole}"]
        assert await bus.conversations.turns(one) == []
