"""`lorafleet jobs` as people run it."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet

from lorafleet.__main__ import main
from lorafleet.shared.api import Api, add_flags
from lorafleet.shared.parser import Parser
from protocol.wire.errors import WorkerLost

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "n": 2, "background": True}


async def lorafleet(gateway: RunningGateway, *words: str) -> int:
    return await asyncio.to_thread(main, ["jobs", *words, "--url", gateway.url])


async def test_jobs_are_listed_shown_followed_and_cancelled(
    gateway: RunningGateway, http: httpx2.AsyncClient, fleet: ScriptedFleet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await lorafleet(gateway, "list") == 0
    assert "no jobs" in capsys.readouterr().out
    fleet.script = lambda submit, body: Script(text=f"choice {submit.choice}", hold_after=2)
    job = (await http.post("/v1/chat/completions", json=CHAT)).json()["id"]
    following = asyncio.create_task(lorafleet(gateway, "tail", job, "--choice", "1"))
    fleet.go.set()
    assert await following == 0
    assert capsys.readouterr().out == "choice 1\n"
    assert await lorafleet(gateway, "list", "--status", "completed", "--model", "base") == 0
    assert job in capsys.readouterr().out
    assert await lorafleet(gateway, "show", job) == 0
    assert "choice 0" in capsys.readouterr().out
    assert await lorafleet(gateway, "cancel", job) == 0
    assert "is completed" in capsys.readouterr().out
    assert await lorafleet(gateway, "show", "job_none") == 2


async def test_a_failed_job_is_told(
    gateway: RunningGateway, http: httpx2.AsyncClient, fleet: ScriptedFleet, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.script = lambda submit, body: Script(error=WorkerLost("three workers died"))
    job = (await http.post("/v1/chat/completions", json=CHAT)).json()["id"]
    assert await lorafleet(gateway, "tail", job) == 1
    assert "three workers died" in capsys.readouterr().err


async def test_an_answer_with_odd_ends_of_lines_is_printed_as_it_is(
    gateway: RunningGateway,
    http: httpx2.AsyncClient,
    fleet: ScriptedFleet,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = "a\u2028data: b\x85c\x0bd\x1ce\u2029f"
    fleet.script = lambda submit, body: Script(text=odd, chunk=2)
    body = {"model": "base", "prompt": "hi", "max_tokens": 100, "background": True}
    job = (await http.post("/v1/completions", json=body)).json()["id"]
    assert await lorafleet(gateway, "tail", job) == 0
    assert odd in capsys.readouterr().out
    parser = Parser()
    add_flags(parser)
    call = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "stream": True}

    def ask() -> str:
        with Api(parser.parse_args(["--url", gateway.url])) as api:
            events = api.events("/v1/chat/completions", "POST", json=call)
            return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])

    assert await asyncio.to_thread(ask) == odd
