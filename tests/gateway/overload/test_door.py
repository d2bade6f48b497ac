"""A gateway that can take no more turns calls away before it looks into them, and keeps what it has."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from scripted_fleet import RunningGateway, Script, ScriptedFleet, running_gateway
from waiting import wait_until

from gateway.overload import door, preparing, pulse
from gateway.overload.door import LOOK_S, MAX_LATE_S, NUM_LOOKS, Door
from gateway.overload.preparing import FEW
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import Overloaded

COMPLETION = {"model": "base", "prompt": "hi", "max_tokens": 60}


def late_door(*late_s: float) -> Door:
    """Return a door whose loop was so late at its last looks."""
    watched = Door(10, lambda: None)
    now_s = time.monotonic() - sum(late_s) - LOOK_S * len(late_s)
    watched.looked_s = now_s
    for each_s in late_s:
        now_s += LOOK_S + each_s
        watched.look(now_s)
    return watched


def test_only_a_loop_that_stays_late_is_late() -> None:
    late_door(*[0.0] * NUM_LOOKS).check()
    late_door(60.0, 60.0, 0.0).check()
    late_door(0.0, 60.0).check()
    with pytest.raises(Overloaded, match=r"3\.0 s late .* the limit is 2 s") as refused:
        late_door(5.0, 3.0, 9.0).check()
    assert refused.value.retry_after_s == pytest.approx(3.0)
    watched = late_door(0.0, 3.0, 3.0)
    watched.check()
    watched.looked_s -= MAX_LATE_S + 1  # the turn that lasts now is one of the looks
    with pytest.raises(Overloaded):
        watched.check()


def test_the_advice_of_a_full_gateway_is_when_a_tenth_of_its_calls_will_have_ended() -> None:
    status = m.SchedulerStatus(queued=0, running=9, workers=1, drain_rate=5.0)
    watched = Door(100, lambda: status)
    watched.num_open = 100
    with pytest.raises(Overloaded, match="answering 100 calls; the limit is 100") as refused:
        watched.check()
    assert refused.value.retry_after_s == pytest.approx(2.0)


def test_calls_that_would_long_be_on_their_way_to_the_queue_are_refused_while_many_are() -> None:
    watched = Door(10_000, lambda: None)
    now_s = watched.looked_s
    watched.look(now_s)
    begun = [watched.preparing.begin() for _ in range(1000)]
    watched.check()  # nobody knows how long it takes
    for _ in range(20):  # 100 a second
        now_s += LOOK_S
        for preparation in [begun.pop() for _ in range(10)]:
            preparation.end(submitted=True)
            preparation.end()  # its call is over, too: it counts once
        watched.look(now_s)
    assert watched.preparing.num == 800
    with pytest.raises(
        Overloaded, match=r"800 calls are on their way to the queue, for about 8 s; the limit is 5 s"
    ) as refused:
        watched.check()
    assert refused.value.retry_after_s == pytest.approx(8.0, rel=0.02)
    while len(begun) > 450:
        begun.pop().end()
    watched.check()
    while begun:
        begun.pop().end()
    for _ in range(100):  # a gateway that has nothing to do does not forget how fast it is
        now_s += LOOK_S
        watched.look(now_s)
    begun = [watched.preparing.begin() for _ in range(400)]
    watched.check()
    begun += [watched.preparing.begin() for _ in range(200)]
    with pytest.raises(Overloaded):
        watched.check()
    for _ in range(30):  # and one where nothing gets on notices
        now_s += LOOK_S
        watched.look(now_s)
    while len(begun) > FEW:
        begun.pop().end()
    with pytest.raises(Overloaded):
        watched.check()
    begun.pop().end()
    watched.check()


async def post(http: httpx2.AsyncClient, path: str = "/v1/completions", body: Any = COMPLETION) -> httpx2.Response:
    return await http.post(path, json=body)


def test_a_crowd_is_not_judged_by_how_few_came_before() -> None:
    watched = Door(10_000, lambda: None)
    now_s = watched.looked_s
    for _ in range(100):  # one call in each tenth of a second: no more were asked for
        preparation = watched.preparing.begin()
        watched.look(now_s := now_s + LOOK_S)
        preparation.end(submitted=True)
    begun = [watched.preparing.begin() for _ in range(400)]
    watched.check()
    for _ in range(14):  # nor by the time in which all of it is read, and none can be submitted yet
        watched.look(now_s := now_s + LOOK_S)
        watched.check()
    for preparation in begun:
        preparation.end(submitted=True)
    watched.look(now_s + LOOK_S)
    [watched.preparing.begin() for _ in range(1000)]
    watched.check()


async def test_a_late_gateway_refuses_at_the_door_keeps_its_streams_and_recovers(
    fleet: ScriptedFleet, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "LOOK_S", 0.002)
    monkeypatch.setattr(door, "MAX_LATE_S", 0.008)
    fleet.script = lambda submit, body: Script(hold_after=2)
    is_late = True

    async def be_late() -> None:
        while is_late:
            time.sleep(0.015)  # noqa: ASYNC251  it is to hold up the loop
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        held = group.create_task(post(http, body={**COMPLETION, "stream": True}))
        await wait_until(lambda: fleet.seen, "a call is let in")
        group.create_task(be_late())

        answer = httpx2.Response(400)

        async def is_refused() -> bool:
            nonlocal answer
            answer = await http.post("/v1/completions", content=b"{this is looked into on time only")
            return answer.status_code != 400

        await wait_until(is_refused, "the gateway is late")
        assert answer.status_code == 429
        assert "s late with what it has; the limit is 0.008 s" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["x-should-retry"] == "true"
        native = await http.post("/generate", json={"inputs": "hi"})
        assert (native.status_code, native.json()["error_type"]) == (429, "overloaded")
        assert (await http.get("/health")).status_code == 200
        fleet.go.set()
        assert (await held).content.endswith(b"data: [DONE]\n\n")
        is_late = False

        async def is_let_in() -> bool:
            return (await post(http)).status_code == 200

        await wait_until(is_let_in, "it is on time again")


async def test_open_calls_are_limited(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=2)
    async with (
        running_gateway(bus, model_folder, max_open_calls=1) as gateway,
        httpx2.AsyncClient(base_url=gateway.url) as http,
        asyncio.TaskGroup() as group,
    ):
        held = group.create_task(post(http))
        await wait_until(lambda: fleet.seen, "a call is let in")
        answer = await post(http)
        assert answer.status_code == 429
        assert answer.json()["error"]["message"] == "this gateway is answering 1 calls; the limit is 1"
        assert answer.headers["retry-after"] == "5"  # nobody knows yet how fast calls end
        assert (await http.get("/v1/jobs")).status_code == 200
        fleet.go.set()
        assert (await held).status_code == 200
        assert (await post(http)).status_code == 200


async def test_calls_wait_in_the_queue_and_not_before_it(
    fleet: ScriptedFleet, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "LOOK_S", 0.01)
    monkeypatch.setattr(preparing, "FEW", 2)
    monkeypatch.setattr(preparing, "MIN_WINDOW_S", 0.05)
    submit, may_submit = Bus.submit, asyncio.Event()

    async def submit_late(self: Bus, *args: Any, **more: Any) -> Any:
        await may_submit.wait()
        return await submit(self, *args, **more)

    monkeypatch.setattr(Bus, "submit", submit_late)
    asked = list[asyncio.Task[httpx2.Response]]()
    async with asyncio.TaskGroup() as group:

        def is_one_refused() -> bool:
            asked.append(group.create_task(post(http)))
            monkeypatch.setattr(door, "MAX_PREPARATION_S", 0.05 if len(asked) > 2 else 5.0)
            return any(answer.done() for answer in asked)

        await wait_until(is_one_refused, "the gateway knows how slow it is")
        may_submit.set()
    told = [answer.result() for answer in asked]
    refused = [answer for answer in told if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {429}
    assert all("calls are on their way to the queue" in answer.json()["error"]["message"] for answer in refused)
    assert len(fleet.seen) == len(told) - len(refused) >= 2
    assert (await post(http)).status_code == 200


async def test_a_gateway_whose_loop_stands_still_lives_until_it_is_stuck(
    bus: Bus, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beat goes on, so that nobody cancels what it has let in."""
    monkeypatch.setattr(pulse, "BEAT_S", 0.02)
    key, num_beats, last_ms = bus.keys.gateway_beat(gateway.gid), 0, 0
    with redis.Redis.from_url(bus.url) as queue:  # one that waits for answers without the loop

        def left_ms() -> int:
            return int(queue.pttl(key))  # type: ignore[arg-type]

        while num_beats < 5:
            now_ms = left_ms()
            assert now_ms > 0, "the gateway counts as dead"
            num_beats += now_ms > last_ms
            last_ms = now_ms
        monkeypatch.setattr(pulse, "BEAT_TTL_MS", 100)
        while left_ms() > 100:
            pass
        monkeypatch.setattr(pulse, "STUCK_S", 0.1)
        while queue.exists(key):
            pass

    async def is_back() -> bool:
        return bool(await bus._redis.exists(key))

    await wait_until(is_back, "the loop turns again")
