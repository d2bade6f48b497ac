"""An Idempotency-Key whose call ended with 503 may be used again; any other outcome is final."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client

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
