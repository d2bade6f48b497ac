"""Each state of a response in each way to read it, and each error with its code."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from helpers.response_events import built, events_of, held_to
from helpers.scripted_fleet import Script, ScriptedFleet
from helpers.waiting import wait_until

from protocol.wire.errors import (
    AdapterRefused,
    BadRequest,
    DeadlineExceeded,
    Internal,
    LorafleetError,
    Overloaded,
    Unavailable,
    WorkerLost,
)

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "base", "input": "hi", "max_output_tokens": 100}
STATES = ("queued", "in_progress", "completed", "incomplete", "failed", "cancelled")
RUNNING = ("queued", "in_progress")
GOES_ON = ("completed", "incomplete")
LAST_EVENT = {"cancelled": "response.failed"}  # other final events are named after the status

Json = dict[str, Any]


async def shown(http: httpx2.AsyncClient, response_id: str) -> Json:
    return held_to((await http.get(f"{PATH}/{response_id}")).json())


async def brought_to(http: httpx2.AsyncClient, fleet: ScriptedFleet, state: str) -> str:
    """Return the id of a background response in the given state."""
    fleet.go.clear()
    if state == "queued":
        fleet.assigning.clear()
    error = WorkerLost("three workers died") if state == "failed" else None
    hold_after = 3 if state in ("in_progress", "cancelled") else None
    fleet.script = lambda submit, body: Script(error=error, hold_after=hold_after)
    num = 4 if state == "incomplete" else 100
    answer = await http.post(PATH, json={**BODY, "background": True, "max_output_tokens": num})
    response_id = held_to(answer.json())["id"]
    first = "in_progress" if state == "cancelled" else state

    async def is_there() -> bool:
        return (await shown(http, response_id))["status"] == first

    await wait_until(is_there, f"the response is {first}")
    if state == "cancelled":
        held_to(await fleet.cancel(http, response_id))
    return response_id


@pytest.mark.parametrize("state", STATES)
async def test_a_state_is_shown_with_what_belongs_to_it(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, state: str
) -> None:
    response_id = await brought_to(http, fleet, state)
    response = await shown(http, response_id)
    assert response["status"] == state
    assert (response["completed_at"] is None) == (state != "completed")
    assert (response["incomplete_details"] is None) == (state != "incomplete")
    assert (response["usage"] is None) == (state not in GOES_ON)
    assert (response["error"] is None) == (state != "failed")
    assert bool(response["output"]) == (state not in RUNNING)
    items = [item["status"] for item in response["output"]]
    assert items == ([] if state in RUNNING else ["completed" if state == "completed" else "incomplete"])
    inputs = (await http.get(f"{PATH}/{response_id}/input_items")).json()
    assert [item["content"][0]["text"] for item in inputs["data"]] == ["hi"]
    fleet.assigning.set()
    fleet.go.set()
    raw = (await http.get(f"{PATH}/{response_id}", params={"stream": True})).content  # continues up to the end
    events, end = events_of(raw), await shown(http, response_id)
    assert events[-1]["type"] == LAST_EVENT.get(end["status"], f"response.{end['status']}")
    assert built(events) == end
    assert state in RUNNING or end == response
    assert sum(event["type"] in {f"response.{name}" for name in STATES[2:]} for event in events) == 1


@pytest.mark.parametrize("state", STATES)
async def test_a_state_allows_what_it_may(http: httpx2.AsyncClient, fleet: ScriptedFleet, state: str) -> None:
    response_id = await brought_to(http, fleet, state)
    on = await http.post(PATH, json={**BODY, "background": True, "previous_response_id": response_id})
    if state in GOES_ON:
        assert on.status_code == 200
    else:
        assert (on.status_code, on.json()["error"]["code"]) == (400, "previous_response_not_completed")
        assert f"is {state}" in on.json()["error"]["message"]
    ended = held_to(await fleet.cancel(http, response_id))
    assert ended["status"] == ("cancelled" if state in RUNNING else state)
    assert held_to(await fleet.cancel(http, response_id)) == ended  # a second time does nothing
    assert (await http.delete(f"{PATH}/{response_id}")).status_code == 200
    for method, path in (("GET", ""), ("GET", "?stream=true"), ("POST", "/cancel"), ("DELETE", "")):
        gone = await http.request(method, f"{PATH}/{response_id}{path}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")
    fleet.assigning.set()


ERRORS: list[tuple[LorafleetError, int, str]] = [
    (BadRequest("the prompt is wrong", code="limit_exceeded"), 400, "invalid_prompt"),
    (Overloaded("too much", 3.0), 429, "rate_limit_exceeded"),
    (AdapterRefused(["rank 9999"]), 422, "server_error"),
    (WorkerLost("three workers died"), 500, "server_error"),
    (Internal("a fault"), 500, "server_error"),
    (Unavailable("memory ended", code="out_of_memory"), 503, "server_error"),
    (DeadlineExceeded("too late"), 504, "server_error"),
]
"""Error of a request in the queue -> HTTP status, and code in the error of a response."""


@pytest.mark.parametrize(("error", "status", "code"), ERRORS, ids=lambda value: type(value).__name__)
async def test_an_error_has_its_code_however_it_is_told(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, error: LorafleetError, status: int, code: str
) -> None:
    told = {"code": code, "message": error.message}
    fleet.script = lambda submit, body: Script(error=error)
    streamed = events_of((await http.post(PATH, json={**BODY, "stream": True})).content)
    assert (streamed[-1]["type"], streamed[-1]["response"]["error"]) == ("response.failed", told)
    raw = (await http.post(PATH, json={**BODY, "stream": True, "background": True})).content
    background = events_of(raw)
    assert (background[-1]["type"], background[-1]["response"]["error"]) == ("response.failed", told)
    for last in (streamed[-1]["response"], background[-1]["response"]):
        assert await shown(http, last["id"]) == last
        replay = await http.get(f"{PATH}/{last['id']}", params={"stream": True})
        assert events_of(replay.content)[-1]["response"] == last
    answer = await http.post(PATH, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, error.code)
    assert answer.json()["error"]["message"] == error.message
    fleet.script = lambda submit, body: Script("", eos=False, error=error)  # before any token
    early = await http.post(PATH, json={**BODY, "stream": True})
    assert (early.status_code, early.json()["error"]["code"]) == (status, error.code)
    polled = (await http.post(PATH, json={**BODY, "background": True})).json()["id"]

    async def has_failed() -> Json | None:
        response = await shown(http, polled)
        return response if response["status"] == "failed" else None

    failed = await wait_until(has_failed, "the response has failed")
    assert (failed["error"], failed["output"], failed["usage"]) == (told, [], None)
