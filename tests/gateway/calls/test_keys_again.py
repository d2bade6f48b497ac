"""An Idempotency-Key whose call ended with 503 may be used again; any other outcome is final."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from protocol.queue.bus import Bus, RequestFacts
from protocol.wire.errors import Internal, LorafleetError, Unavailable

BODY = {"model": "base", "prompt": "the dog", "max_tokens": 6}
HEAD = {"Idempotency-Key": "again"}


@pytest.mark.parametrize("stream", [False, True])
async def test_what_nobody_could_serve_is_run_again(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, *, stream: bool
) -> None:
    fleet.script = lambda submit, body: Script(error=Unavailable("no worker joined in time"))
    body = {**BODY, "stream": stream}
    async with gateway_client(bus, model_folder) as http:
        first = await http.post("/v1/completions", json=body, headers=HEAD)
        assert "no worker joined in time" in first.text
        fleet.script = lambda submit, body: Script()
        again = await asyncio.gather(*(http.post("/v1/completions", json=body, headers=HEAD) for _ in range(4)))
        assert [one.status_code for one in again] == [200] * 4
        assert not [one.text for one in again if "no worker joined" in one.text]
        other = await http.post("/v1/completions", json={**body, "max_tokens": 3}, headers=HEAD)
        assert other.status_code == 422
    assert len(fleet.seen) == 2  # the first call, and a single one for all repetitions


async def test_a_response_that_nobody_could_serve_is_made_again(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.script = lambda submit, body: Script(error=Unavailable("no worker joined in time"))
    async with gateway_client(bus, model_folder) as http:
        body = {"model": "base", "input": "hi"}
        assert (await http.post("/v1/responses", json=body, headers=HEAD)).status_code == 503
        fleet.script = lambda submit, body: Script()
        made, again = [(await http.post("/v1/responses", json=body, headers=HEAD)).json() for _ in range(2)]
        assert made["status"] == "completed"
        assert again == made


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [("/v1/responses", {"input": "hi"}, "/v1/responses/"), ("/v1/completions", {"prompt": "hi"}, "/v1/jobs/")],
)
async def test_a_job_that_nobody_could_serve_is_run_again(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, path: str, body: dict[str, Any], place: str
) -> None:
    fleet.script = lambda submit, body: Script(error=Unavailable("no worker joined in time"))
    body = {"model": "base", "background": True, **body}
    async with gateway_client(bus, model_folder) as http:

        async def ended() -> tuple[str, str]:
            """Send the call; return its record's id, and how it has ended."""
            id_ = (await http.post(path, json=body, headers=HEAD)).json()["id"]

            async def status() -> str | None:
                now = (await http.get(place + id_)).json()["status"]
                return now if now in ("completed", "failed") else None

            return id_, await wait_until(status, "the job has ended")

        first, how = await ended()
        assert how == "failed"
        fleet.script = lambda submit, body: Script()
        second, how = await ended()
        assert how == "completed"
        assert (await http.delete(place + first)).status_code == 200
        assert await ended() == (second, how)  # the key belongs to the second call


@pytest.mark.parametrize("error", [Internal("it broke"), None])
async def test_any_other_end_is_the_answer_for_a_day(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, error: LorafleetError | None
) -> None:
    fleet.script = lambda submit, body: Script(error=error)
    async with gateway_client(bus, model_folder) as http:
        first = await http.post("/v1/completions", json=BODY, headers=HEAD)
        fleet.script = lambda submit, body: Script()
        again = await http.post("/v1/completions", json=BODY, headers=HEAD)
        assert again.status_code == first.status_code == (200 if error is None else 500)
    assert len(fleet.seen) == 1


async def test_a_repetition_reads_its_requests_once(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[str]] = []
    requests = Bus.requests

    async def counted(self: Bus, rids: Sequence[str]) -> list[RequestFacts | None]:
        read.append(list(rids))
        return await requests(self, rids)

    async with gateway_client(bus, model_folder) as http:
        first = (await http.post("/v1/completions", json={**BODY, "n": 2}, headers=HEAD)).json()
        monkeypatch.setattr(Bus, "requests", counted)
        again = (await http.post("/v1/completions", json={**BODY, "n": 2}, headers=HEAD)).json()
        assert again == first
    assert [len(rids) for rids in read] == [2]
