"""A gateway of a fleet with fewer workers than bases: which calls wait for a swap, and how it is reported."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest_asyncio
from helpers.reported import report
from helpers.scripted_fleet import ScriptedFleet, gateway_client

from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m
from tests.gateway.test_bases import base, chat, speaking

NAMES = ("a", "b", "c")


async def tell(bus: Bus, loads: dict[str, m.BaseLoad], **more: dict[str, str]) -> None:
    """Publish the bases `a` and `b`, and the scheduler's view. The base `c` has never been published."""
    await report(bus, base("a"))
    await bus._redis.hset(bus.keys.bases, "b", m.encode(base("b")))
    status = m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=0.0, sent_ms=now_ms(), bases=loads, **more)  # type: ignore[arg-type]
    await bus.set(bus.keys.status, status, 3_600_000)


REACHED = {"a": m.BaseLoad(1), "b": m.BaseLoad(may_become=1), "c": m.BaseLoad(may_become=1)}
UNREACHED = {"a": m.BaseLoad(1)}
ON_ITS_WAY = {name: m.BaseLoad(may_become=1) for name in NAMES}


@pytest_asyncio.fixture
async def http(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway, which looks at the fleet again for each call that it would refuse."""
    folders = [speaking(tmp_path, name) for name in NAMES]
    await tell(bus, UNREACHED)
    async with gateway_client(bus, folders[0], more_models=f"{folders[1]},{folders[2]}") as client:
        yield client


async def test_calls_of_a_base_that_a_worker_may_become_are_accepted(
    bus: Bus, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    refused = await chat(http, "b")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker"), refused.text
    for loads in (REACHED, ON_ITS_WAY):
        await tell(bus, loads)
        answer = await chat(http, "b")
        assert answer.status_code == 200, answer.text
        assert fleet.seen[-1][0].base == "b"
    assert (await http.get("/health")).status_code == 200  # even while the only worker is switching


async def test_a_base_that_was_never_served_is_told_to_be_on_its_way(bus: Bus, http: httpx2.AsyncClient) -> None:
    """Neither its context length nor its tasks are known yet."""
    await tell(bus, REACHED)
    answer = await chat(http, "c")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_starting"), answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert "no worker is ready to serve `c`; a worker is about to serve it" in answer.text


async def test_a_base_that_failed_is_not_waited_for_whatever_may_become_it(bus: Bus, http: httpx2.AsyncClient) -> None:
    await tell(bus, REACHED)
    for name in ("b", "c"):
        await bus.members.note_failure(name, "no memory")
    assert set((await http.get("/v1/fleet")).json()["failed"]) == {"b", "c"}  # the gateway has read them
    for name in ("b", "c"):
        answer = await chat(http, name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_failed"), answer.text
        assert answer.text.count("it did not start: no memory") == 1
    assert (await chat(http, "a")).status_code == 200


async def test_who_becomes_what_is_shown(bus: Bus, http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.stop_beating()
    await tell(bus, REACHED, becoming={"worker-0": "b"})
    beat = m.WorkerBeat(wid="w1", name="worker-0", capacity=0, base="a", becoming="b", draining=True, sent_ms=now_ms())
    await bus.members.beat(bus.keys.worker_beat("w1"), bus.keys.workers, "w1", m.encode(beat), 3_600_000)
    found = (await http.get("/v1/fleet")).json()
    assert found["becoming"] == {"worker-0": "b"}
    assert {one["name"]: one["may_become"] for one in found["bases"]} == {"a": 0, "b": 1, "c": 1}
    (worker,) = (await http.get("/v1/workers")).json()["data"]
    assert (worker["base"], worker["becoming"], worker["state"]) == ("a", "b", "draining")
