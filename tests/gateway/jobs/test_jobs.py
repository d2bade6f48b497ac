"""Background jobs and idempotency keys: calls that outlive their client and their gateway."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from protocol.wire.errors import WorkerLost

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "seed": 1}
COMPLETION = {"model": "base", "prompt": ["hi", "the dog"], "n": 2, "max_tokens": 60, "seed": 1, "echo": True}


def without_identity(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer without the fields that differ between two calls or are missing in a log."""
    usage = {key: value for key, value in answer["usage"].items() if key != "prompt_tokens_details"}
    return {**{key: value for key, value in answer.items() if key not in ("id", "created")}, "usage": usage}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2, "stop": "you"}),
        ("/v1/completions", COMPLETION),
        ("/v1/completions", {"model": "base", "prompt": [5, 6], "logprobs": 1, "max_tokens": 3}),
    ],
)
async def test_a_job_s_result_is_what_the_call_would_answer(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str, body: dict[str, Any]
) -> None:
    direct = (await http.post(path, json=body)).json()
    accepted = await http.post(path, json={**body, "background": True, "metadata": {"who": "me"}})
    assert accepted.status_code == 202
    job = accepted.json()
    assert job["id"].startswith("job_")
    assert (job["object"], job["endpoint"], job["model"]) == ("job", path, "base")
    assert job["metadata"] == {"who": "me"}
    assert job["expires_at"] - job["created_at"] == 86_400
    done = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})).json()
    assert done["status"] == "completed"
    assert done["position"] is None
    assert done["completed_at"] >= done["started_at"] >= done["created_at"]
    assert done["tokens_generated"] == direct["usage"]["completion_tokens"]
    assert done["result"]["id"].endswith(job["id"].removeprefix("job_"))
    assert without_identity(done["result"]) == without_identity(direct)
    stored = [submit for submit, _ in fleet.seen if submit.stored]
    assert len(stored) == len(direct["choices"])
    assert {(submit.gateway, submit.cls) for submit in stored} == {("", "batch")}


async def test_a_job_s_result_ends_with_the_request_s_id(http: httpx2.AsyncClient) -> None:
    body = {"model": "base", "prompt": "hi", "max_tokens": 3}
    for sent in (body, {**body, "background": True}):
        answer = await http.post("/v1/completions", json=sent, headers={"X-Request-Id": "mine"})
        made = answer.json()
        if answer.status_code == 202:
            made = (await http.get(f"/v1/jobs/{made['id']}", headers={"Prefer": "wait=20"})).json()["result"]
        assert made["id"] == "cmpl-mine"


async def test_a_job_outlives_its_gateway(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=3)
    async with gateway_client(bus, model_folder) as http:
        job = (await http.post("/v1/chat/completions", json={**CHAT, "background": True})).json()
    fleet.go.set()
    async with gateway_client(bus, model_folder) as http:
        done = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})).json()
    assert done["status"] == "completed"
    assert done["result"]["choices"][0]["message"]["content"] == Script().text


async def test_a_job_tells_its_position_and_progress_and_is_cancelled(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus
) -> None:
    fleet.assigning.clear()
    fleet.script = lambda submit, body: Script(hold_after=3)
    jobs = [(await http.post("/v1/chat/completions", json={**CHAT, "background": True})).json() for _ in range(3)]
    assert [job["status"] for job in jobs] == ["queued"] * 3
    assert [job["position"] for job in jobs] == [0, 1, 2]
    cancelled = (await http.post(f"/v1/jobs/{jobs[0]['id']}/cancel")).json()
    assert (cancelled["status"], cancelled["result"]) == ("cancelled", None)
    assert (await http.get(f"/v1/jobs/{jobs[2]['id']}")).json()["position"] == 1
    fleet.assigning.set()

    async def is_running() -> bool:
        job = (await http.get(f"/v1/jobs/{jobs[1]['id']}")).json()
        return job["status"] == "running" and job["tokens_generated"] == 3

    await wait_until(is_running, "the job has made three tokens")
    await http.post(f"/v1/jobs/{jobs[1]['id']}/cancel")
    fleet.go.set()
    done = (await http.get(f"/v1/jobs/{jobs[1]['id']}", headers={"prefer": "wait=30"})).json()
    assert (done["status"], done["tokens_generated"]) == ("cancelled", 3)
    assert await bus._redis.xlen(bus.keys.sub("batch")) == 0


async def test_a_failed_job_shows_its_error(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(error=WorkerLost("three workers died"))
    job = (await http.post("/v1/chat/completions", json={**CHAT, "background": True})).json()
    done = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})).json()
    assert done["status"] == "failed"
    assert done["error"]["message"] == "three workers died"
    assert done["error"]["code"] == "worker_lost"
    assert done["result"] is None


async def test_jobs_are_listed_newest_first_in_pages(http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus) -> None:
    made: list[str] = []
    for i in range(5):
        if i == 3:
            fleet.assigning.clear()
        job = (await http.post("/v1/chat/completions", json={**CHAT, "background": True})).json()
        made.append(job["id"])
        if i < 3:
            await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})
        await bus._redis.zadd(bus.keys.jobs("public"), {job["id"]: job["created_at"] * 1000 + i})  # distinct times
    newest = made[::-1]
    page = (await http.get("/v1/jobs", params={"limit": 2})).json()
    assert [job["id"] for job in page["data"]] == newest[:2]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, newest[0], newest[1])
    assert "result" not in page["data"][0]
    rest = (await http.get("/v1/jobs", params={"after": newest[1]})).json()
    assert [job["id"] for job in rest["data"]] == newest[2:]
    assert rest["has_more"] is False
    queued = (await http.get("/v1/jobs", params={"status": "queued"})).json()
    assert [job["id"] for job in queued["data"]] == newest[:2]
    completed = (await http.get("/v1/jobs", params={"status": "completed", "limit": 1})).json()
    assert [job["id"] for job in completed["data"]] == newest[2:3]
    assert completed["has_more"] is True
    for query, param in (({"limit": 0}, "limit"), ({"after": "job_x"}, "after"), ({"status": "x"}, "status")):
        answer = await http.get("/v1/jobs", params=query)
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == param
    fleet.assigning.set()


async def test_an_expired_request_makes_an_expired_job(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus
) -> None:
    job = (await http.post("/v1/chat/completions", json={**CHAT, "background": True})).json()
    await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})
    await bus._redis.delete(bus.keys.req(fleet.seen[0][0].rid))
    assert (await http.get(f"/v1/jobs/{job['id']}")).json()["status"] == "expired"


async def test_jobs_are_accepted_while_no_worker_is_there(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus, model_folder: Path
) -> None:
    """The base model is known from earlier."""
    fleet.assigning.clear()
    await fleet.stop_beating()
    await bus._redis.delete(bus.keys.workers)
    async with gateway_client(bus, model_folder) as other:
        assert (await other.post("/v1/chat/completions", json=CHAT)).status_code == 503
        job = await other.post("/v1/chat/completions", json={**CHAT, "background": True})
        assert (job.status_code, job.json()["status"]) == (202, "queued")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_repeated_key_replays_the_same_answer(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, stream: bool
) -> None:
    body, headers = {**CHAT, "stream": stream, "n": 2}, {"idempotency-key": "k1"}
    first = await http.post("/v1/chat/completions", json=body, headers=headers)
    second = await http.post("/v1/chat/completions", json=body, headers=headers)
    assert len(fleet.seen) == 2
    if stream:
        for answer in (first, second):
            assert answer.content.endswith(b"data: [DONE]\n\n")
    else:
        assert first.json()["id"] == second.json()["id"]
        assert without_identity(first.json()) == without_identity(second.json())
    other = await http.post("/v1/chat/completions", json={**body, "seed": 2}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert len(fleet.seen) == 2


async def test_a_client_with_a_key_can_leave_and_come_back_elsewhere(
    bus: Bus, fleet: ScriptedFleet, gateway: RunningGateway, model_folder: Path
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=4)
    headers = {"idempotency-key": "k2"}
    async with gateway.client() as http, asyncio.TaskGroup() as group:
        asked = group.create_task(http.post("/v1/chat/completions", json=CHAT, headers=headers))
        await wait_until(lambda: fleet.seen, "it runs")
        asked.cancel()
    async with (
        gateway_client(bus, model_folder) as http,
        asyncio.TaskGroup() as group,
    ):
        asked = group.create_task(http.post("/v1/chat/completions", json=CHAT, headers=headers))
        fleet.go.set()
        answer = (await asked).json()
    assert answer["choices"][0]["message"]["content"] == Script().text
    assert answer["model"] == "base"
    assert len(fleet.seen) == 1
    assert await bus._redis.hget(bus.keys.req(fleet.seen[0][0].rid), "cancel") == b"0"


async def test_two_calls_with_one_key_at_once_run_once(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    headers = {"idempotency-key": "k3"}
    answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=CHAT, headers=headers) for _ in range(5)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {Script().text}
    assert len(fleet.seen) == 1


async def test_a_job_with_a_key_is_made_once(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    headers, body = {"idempotency-key": "k4"}, {**CHAT, "background": True}
    answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=body, headers=headers) for _ in range(3)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len((await http.get("/v1/jobs")).json()["data"]) == 1


async def test_a_job_that_a_queue_lost_with_its_last_second_is_made_again(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus
) -> None:
    """Job, requests and key are written atomically, so they are lost together."""
    headers, body = {"idempotency-key": "k5"}, {**CHAT, "background": True}
    lost = (await http.post("/v1/chat/completions", json=body, headers=headers)).json()
    await http.get(f"/v1/jobs/{lost['id']}", headers={"prefer": "wait=30"})
    for kind in ("job", "idem", "req", "tok", "call", "body"):
        await bus._redis.delete(*await bus._redis.keys(f"{bus.keys.tag}:{kind}*"), "none")
    job = (await http.post("/v1/chat/completions", json=body, headers=headers)).json()
    assert job["id"] != lost["id"]
    done = await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})
    assert done.json()["result"]["choices"][0]["message"]["content"] == Script().text
    assert [listed["id"] for listed in (await http.get("/v1/jobs")).json()["data"]] == [job["id"]]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "MARK the quick brown fox"}]}),
        ("/v1/completions", {**COMPLETION, "prompt": "MARK the quick brown fox", "echo": False}),
    ],
)
async def test_a_job_keeps_what_it_needs_once(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus, path: str, body: dict[str, Any]
) -> None:
    fleet.assigning.clear()
    unused: dict[str, Any] = {"user": "MARK" * 10_000}
    if "messages" in body:
        unused["chat_template_kwargs"] = {"unused": "MARK"}
    asked = {**body, **unused, "background": True, "metadata": {"note": "ONCE"}, "api_token": "MARK"}
    job = (await http.post(path, json=asked)).json()
    await wait_until(lambda: len(fleet.seen) == body.get("n", 1), "its requests have come")
    found: list[bytes] = []
    for key in await bus._redis.keys(f"{bus.keys.tag}:*"):
        kind = await bus._redis.type(key)
        if kind == b"hash":
            found += (await bus._redis.hgetall(key)).values()
        elif kind == b"string":
            found.append(await bus._redis.get(key))
    everything = b"".join(found)
    assert b"MARK" not in everything
    assert everything.count(b"ONCE") == 1
    assert everything.count(fleet.seen[0][1].prompt) == 1
    fleet.assigning.set()
    done = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=30"})).json()
    assert done["status"] == "completed"
    assert done["metadata"] == {"note": "ONCE"}
    assert await bus._redis.keys(f"{bus.keys.tag}:body:*") == []  # bodies are deleted at the end


@pytest.mark.parametrize("state", ["queued", "running", "completed"])
async def test_a_deleted_job_ends_and_leaves_nothing(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus, state: str
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=3 if state == "running" else None)
    if state == "queued":
        fleet.assigning.clear()
    headers, body = {"idempotency-key": "k6"}, {**CHAT, "n": 2, "background": True}
    job = (await http.post("/v1/chat/completions", json=body, headers=headers)).json()

    async def is_so() -> bool:
        return (await http.get(f"/v1/jobs/{job['id']}")).json()["status"] == state

    await wait_until(is_so, f"the job is {state}")
    answer = await http.delete(f"/v1/jobs/{job['id']}")
    assert (answer.status_code, answer.json()) == (200, {"id": job["id"], "object": "job", "deleted": True})
    for gone in (await http.get(f"/v1/jobs/{job['id']}"), await http.delete(f"/v1/jobs/{job['id']}")):
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "job_not_found")
    assert (await http.get("/v1/jobs")).json()["data"] == []
    fleet.go.set()
    fleet.assigning.set()
    call = job["id"].removeprefix("job_")
    assert await bus._redis.keys(f"*{call}*") == []
    assert await bus._redis.xlen(bus.keys.sub("batch")) == 0
    again = (await http.post("/v1/chat/completions", json=body, headers=headers)).json()
    assert again["id"] != job["id"]


async def test_a_page_of_jobs_ends_when_it_has_cost_enough(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, bus: Bus
) -> None:
    fleet.assigning.clear()
    body = {**CHAT, "n": 128, "background": True}
    made = [(await http.post("/v1/chat/completions", json=body)).json()["id"] for _ in range(20)]
    found: list[str] = []
    pages = 0
    after: dict[str, str] = {}
    while True:
        page = (await http.get("/v1/jobs", params={"limit": 100, **after})).json()
        assert len(page["data"]) <= 16  # each costs 128 lookups
        found += [job["id"] for job in page["data"]]
        pages += 1
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert sorted(found) == sorted(made)
    assert pages > 1
    none = (await http.get("/v1/jobs", params={"status": "failed"})).json()
    assert (none["data"], none["first_id"], none["has_more"]) == ([], None, True)
    last = (await http.get("/v1/jobs", params={"status": "failed", "after": none["last_id"]})).json()
    assert last["data"] == []


def events_of(text: str) -> list[tuple[str, str]]:
    """Return the id and data of each event of a stream."""
    found: list[tuple[str, str]] = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("id", ""), fields["data"]))
    return found


def shown(events: list[tuple[str, str]]) -> dict[int, str]:
    """Return the text of each choice."""
    texts: dict[int, str] = {}
    for _, data in events:
        for choice in json.loads(data)["choices"] if data != "[DONE]" else []:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


@pytest.mark.parametrize("body", [COMPLETION, {**COMPLETION, "prompt": "hi", "logprobs": 2, "n": 1, "stop": "are"}])
async def test_a_jobs_stream_is_the_same_each_time_and_from_anywhere(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, body: dict[str, Any]
) -> None:
    fleet.script = lambda submit, body: Script(hold_after=3, chunk=2)
    job = (await http.post("/v1/completions", json={**body, "background": True})).json()
    path = f"/v1/jobs/{job['id']}/stream"
    live = asyncio.create_task(http.get(path))
    fleet.go.set()
    whole = events_of((await live).text)
    assert whole[-1][1] == "[DONE]"
    done = (await http.get(f"/v1/jobs/{job['id']}")).json()
    texts = {choice["index"]: choice["text"] for choice in done["result"]["choices"]}
    assert shown(whole) == texts
    again = events_of((await http.get(path)).text)
    assert shown(again) == texts
    if job["model"] and len(texts) == 1:
        assert again == whole
    for at in range(0, len(whole) - 1, 3):
        before = shown(whole[: at + 1])
        rest = events_of((await http.get(path, headers={"last-event-id": whole[at][0]})).text)
        after = shown(rest)
        assert {index: before.get(index, "") + after.get(index, "") for index in texts} == texts
    for wrong in ("x", "1,2,3,4,5,6", "-1"):
        answer = await http.get(path, headers={"last-event-id": wrong})
        assert answer.status_code == 400, wrong


async def test_a_stream_ends_with_what_ended_its_job(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(error=WorkerLost("three workers died"))
    job = (await http.post("/v1/completions", json={**COMPLETION, "background": True})).json()
    last = events_of((await http.get(f"/v1/jobs/{job['id']}/stream")).text)[-1]
    assert json.loads(last[1])["error"]["code"] == "worker_lost"
    assert (await http.get("/v1/jobs/job_none/stream")).status_code == 404
    best = {"model": "base", "prompt": "hi", "best_of": 3, "background": True, "temperature": 1}
    job = (await http.post("/v1/completions", json=best)).json()
    assert (await http.get(f"/v1/jobs/{job['id']}/stream")).status_code == 400


async def test_a_waiting_job_says_what_it_waits_for(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.assigning.clear()
    for model in ("base", "base"):
        job = (await http.post("/v1/completions", json={**COMPLETION, "model": model, "background": True})).json()
    assert (job["position"], job["waiting_for"]) == (4, "queued, 4 ahead of it")
    listed = (await http.get("/v1/jobs", params={"model": "base"})).json()["data"]
    assert len(listed) == 2
    assert (await http.get("/v1/jobs", params={"model": "other"})).json()["data"] == []
    fleet.assigning.set()


async def test_long_answers_are_paid_before_they_are_read(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    """Each read of a long answer is charged by the number of its tokens, before it is made."""
    fleet.max_model_len, fleet.script = 8192, lambda submit, body: Script("the dog " * 1500, chunk=500)
    await fleet.register()
    secret, _ = await bus.api_keys.create("acme", ["infer"])
    async with gateway_client(bus, model_folder, api_keys=True, reads_per_s=1.0, key=secret) as http:
        body = {**CHAT, "max_tokens": 8000, "background": True}
        job = (await http.post("/v1/chat/completions", json=body)).json()
        facts: list[Any] = []

        async def has_ended() -> bool:
            facts[:] = await bus.requests([fleet.seen[0][0].rid]) if fleet.seen else []
            return bool(facts) and facts[0].is_terminal

        await wait_until(has_ended, "the job has ended")
        assert facts[0].num_output_tokens > 2 * 512
        answers = await asyncio.gather(*(http.get(f"/v1/jobs/{job['id']}") for _ in range(5)))
        told = sorted(answer.status_code for answer in answers)
        assert told[0] == 200, "who has something left is answered"
        assert told.count(429) >= 3, told
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
