"""A fleet with two of each service, while its processes die and drain; clients get complete answers.

The tests share one fleet, in any order: after each test, processes that ended are restarted, and no request remains.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from helpers.factories import make_adapter, make_tiny_model
from helpers.preloaded import fork
from helpers.response_events import built, events_of
from helpers.waiting import wait_until

from chaos.clients.asks import GREEDY, Ask
from chaos.clients.client import Attempt, Call, Client, Style
from chaos.fleet import Member, ProcessFleet, Shape
from protocol.queue.books.usage import DAY_S
from protocol.queue.bus import now_ms
from protocol.wire import messages as m

SHAPE = Shape(gateways=2, schedulers=2, workers=("w0", "w1"), stores=1)
MODELS = ("base", "one", "two")
NUM_TOKENS = 150
ENDLESS = 40_000
"""Number of tokens of an answer that outlasts its test: a worker makes 1000 a second."""

PAUSE_S = 1.0
"""Pause between two calls of a client, s: restarting services need the cores."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessFleet]:
    folder: Path = tmp_path_factory.mktemp("fleet")
    model = make_tiny_model(folder / "model", max_len=ENDLESS + 100)
    for seed, name in enumerate(MODELS[1:], start=1):
        make_adapter(folder / "adapters" / name, model, seed=seed)
    running = ProcessFleet.prepare(
        folder,
        model,
        folder / "adapters",
        durable=True,
        spawn=fork,
        request_timeout_s=120,
        max_attempts=3,
        keepalive_s=1,
    )
    try:
        await running.start_all(SHAPE)
        yield running
    finally:
        await running.close()


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(shared_fleet: ProcessFleet) -> AsyncIterator[ProcessFleet]:
    """The fleet with all its processes; after the test they are restarted, and none of its requests remains."""
    yield shared_fleet
    for member in shared_fleet.members.values():
        if not member.is_running:
            shared_fleet.start(member.service, member.name)
    for member in shared_fleet.members.values():
        await wait_until(lambda member=member: shared_fleet.is_up(member), f"{member.name} is back", timeout_s=100)
    await wait_until(lambda: is_idle(shared_fleet), "nothing is queued or running")
    assert await shared_fleet.bus._redis.xlen(shared_fleet.bus.keys.dlq) == 0
    assert await shared_fleet.bus.untimed_keys() == []


pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


def asks(num_tokens: int = NUM_TOKENS) -> list[Ask]:
    return [Ask(model, prompt, num_tokens, tuple(GREEDY.items())) for model in MODELS for prompt in ("x", "Another")]


async def ask_once(fleet: ProcessFleet, ask: Ask) -> Call:
    client = Client(fleet.urls)
    call = Call(ask, "stream", time.monotonic())
    await client.ask(ask, "stream", call)
    await client.close()
    return call


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def right(shared_fleet: ProcessFleet) -> dict[Ask, str]:
    """The answers of the undisturbed fleet."""
    calls = await asyncio.gather(*(ask_once(shared_fleet, ask) for ask in asks()))
    assert all(call.is_complete and len(call.attempts) == 1 for call in calls)
    texts = {call.ask: call.attempts[0].text for call in calls}
    assert len(set(texts.values())) == len(texts)
    return texts


class Traffic:
    """Clients that call repeatedly; every answer must be correct, and a begun answer must not be interrupted."""

    def __init__(self, fleet: ProcessFleet, right: dict[Ask, str], num_clients: int = 6) -> None:
        self.calls: list[Call] = []
        self._client = Client(fleet.urls)
        self._right = right
        self._stop = asyncio.Event()
        self._num_clients = num_clients
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Traffic:
        self._tasks = [asyncio.create_task(self._be_client(i)) for i in range(self._num_clients)]
        await wait_until(lambda: self.calls, "somebody has been answered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._client.close()

    async def _be_client(self, number: int) -> None:
        todo = list(self._right)
        while not self._stop.is_set():
            ask = todo[number % len(todo)]
            number += 1
            call = Call(ask, "stream", time.monotonic())
            await self._client.ask(ask, "stream", call)
            assert call.is_complete
            assert call.attempts[-1].text == self._right[ask]
            self.calls.append(call)
            await asyncio.sleep(PAUSE_S)

    @property
    def errors(self) -> list[Attempt]:
        """Return the failed attempts that a load balancer, which retries at the next gateway, would not have hidden."""
        unfinished = [attempt for call in self.calls for attempt in call.attempts if attempt.outcome != "complete"]
        return [a for a in unfinished if a.text or not (a.outcome == "cut" or a.code == "shutting_down")]


async def test_restarts_of_every_service_under_load_show_no_error(fleet: ProcessFleet, right: dict[Ask, str]) -> None:
    """One process of each service first, all at the same time, then the others."""
    members = list(fleet.members.values())
    first = {member.service: member for member in members}.values()
    async with Traffic(fleet, right) as traffic:
        await asyncio.gather(*(restart(fleet, member) for member in first))
        await asyncio.gather(*(restart(fleet, member) for member in members if member not in first))
    assert traffic.errors == []
    today = now_ms() // (DAY_S * 1000)
    told = [await fleet.bus.usage.residency(day) for day in (today - 1, today)]
    assert sum(len(seconds) for seconds in told) >= 2  # each worker has reported its pool's residency when it drained


async def restart(fleet: ProcessFleet, member: Member) -> None:
    """Drain a member, restart it and wait until it works."""
    fleet.signal(member.name, signal.SIGTERM)
    await wait_until(lambda: not member.is_running, f"{member.name} has drained")
    assert member.process is not None
    assert member.process.returncode == 0, member.log_tail()
    fleet.start(member.service, member.name)
    await wait_until(lambda: fleet.is_up(member), f"{member.name} is back", timeout_s=100)


async def test_another_gateway_tells_what_a_killed_one_had_begun(fleet: ProcessFleet, right: dict[Ask, str]) -> None:
    """With an Idempotency-Key the request continues, and is sent from its first token; without one it is cancelled."""
    ask = asks()[0]
    first, second = (member for member in fleet.members.values() if member.service == "gateway")
    one, other = (f"http://127.0.0.1:{member.settings.port}" for member in (first, second))
    long = {**ask.body(stream=True), "max_tokens": ENDLESS}
    shown: dict[str, Attempt] = {}

    async def listen(key: str) -> None:
        shown[key] = Attempt(one, time.monotonic())
        headers = {"idempotency-key": key} if key else {}
        async with (
            httpx2.AsyncClient(timeout=60) as http,
            http.stream("POST", f"{one}/v1/completions", json=long, headers=headers) as answer,
        ):
            async for line in answer.aiter_lines():
                shown[key].take_line(line)

    listening = [asyncio.create_task(listen(key)) for key in ("", "key")]
    await wait_until(lambda: len(shown) == 2 and all(len(a.text) > 50 for a in shown.values()), "both stream")
    fleet.kill(first.name)
    for result in await asyncio.gather(*listening, return_exceptions=True):
        assert isinstance(result, httpx2.TransportError)
    again = Attempt(other, time.monotonic())
    body, headers = {**long, "model": ask.model}, {"idempotency-key": "key"}
    async with (
        httpx2.AsyncClient(timeout=60) as http,
        http.stream("POST", f"{other}/v1/completions", json=body, headers=headers) as answer,
    ):
        async for line in answer.aiter_lines():
            again.take_line(line)
            if len(again.text) > len(shown["key"].text) + 50:
                break
    assert again.call == shown["key"].call
    assert again.text.startswith(shown["key"].text)
    length = min(len(again.text), len(right[ask]))
    assert again.text[:length] == right[ask][:length]
    bus = fleet.bus

    async def is_cancelled() -> bool:
        (facts,) = await bus.requests([f"{shown[''].call}-0"])
        return facts is not None and facts.state == "cancelled"

    await wait_until(is_cancelled, "nobody computes for nobody")
    await bus.cancel(f"{again.call}-0")


async def test_usage_is_what_clients_were_told_though_all_die(fleet: ProcessFleet, right: dict[Ask, str]) -> None:
    """Every call has a key, so each client finally gets its end, and no request runs without being reported."""
    before = await used(fleet)
    styles: tuple[Style, ...] = ("keyed stream", "keyed whole", "job")
    calls = [Call(ask, style, time.monotonic()) for ask in right for style in styles]
    client = Client(fleet.urls)

    async with asyncio.TaskGroup() as group:
        for call in calls:
            group.create_task(client.ask(call.ask, call.style, call))
        await wait_until(lambda: any(call.attempts and call.attempts[-1].text for call in calls), "workers have begun")
        fleet.kill("w0")
        fleet.kill(next(member.name for member in fleet.members.values() if member.service == "gateway"))
    await client.close()
    told = Counter[tuple[str, str]]()
    for call in calls:
        assert call.attempts[-1].text == right[call.ask]
        told[call.ask.model, "requests"] += 1
        for count in ("prompt_tokens", "completion_tokens"):
            told[call.ask.model, count] += call.attempts[-1].usage[count]
        told[call.ask.model, "cached_tokens"] += call.attempts[-1].usage["prompt_tokens_details"]["cached_tokens"]
    after = await used(fleet)
    after.subtract(before)
    assert after == told


async def used(fleet: ProcessFleet) -> Counter[tuple[str, str]]:
    found = Counter[tuple[str, str]]()
    today = now_ms() // (DAY_S * 1000)
    for day in (today - 1, today):
        for row in await fleet.bus.usage.rows(day, "public"):
            model = row.model if row.digest else "base"
            found[model, "requests"] += row.requests
            found[model, "prompt_tokens"] += row.prompt_tokens
            found[model, "completion_tokens"] += row.output_tokens
            found[model, "cached_tokens"] += row.cached_tokens
    return found


async def test_a_response_outlives_its_gateway_and_its_worker(fleet: ProcessFleet) -> None:
    """Its events continue at the other gateway without a gap, and its text is that of a chat."""
    first, second = (member for member in fleet.members.values() if member.service == "gateway")
    one, other = (f"http://127.0.0.1:{member.settings.port}/v1" for member in (first, second))
    async with httpx2.AsyncClient(timeout=120) as http:

        async def chat(model: str) -> str:
            messages = [{"role": "user", "content": "x"}]
            body = {"model": model, "messages": messages, "max_tokens": 600, "temperature": 0}
            return (await http.post(f"{other}/chat/completions", json=body)).json()["choices"][0]["message"]["content"]

        texts = [await chat(model) for model in MODELS]
        assert len(set(texts)) == len(MODELS)
        body = {"model": "one", "input": "x", "max_output_tokens": 600, "temperature": 0, "background": True}
        raw = b""
        async with http.stream("POST", f"{one}/responses", json={**body, "stream": True}) as answer:
            async for part in answer.aiter_raw():
                raw += part
                if raw.count(b"event: response.output_text.delta") > 5:
                    break
        seen = events_of(raw[: raw.rfind(b"\n\n") + 2])
        fleet.kill(first.name)
        fleet.kill("w0")
        url, last = f"{other}/responses/{seen[0]['response']['id']}", seen[-1]["sequence_number"]
        rest = await http.get(url, params={"stream": True, "starting_after": last})
        response = built([*seen, *events_of(rest.content)])
        assert events_of(rest.content)[0]["sequence_number"] == last + 1
        assert response["output"][0]["content"][0]["text"] == texts[1]
        assert (await http.get(url)).json() == response
        await http.delete(url)


async def test_two_hundred_long_streams_end_when_their_clients_leave(
    fleet: ProcessFleet, right: dict[Ask, str]
) -> None:
    """Their remaining tokens are never computed."""
    bus, before = fleet.bus, await num_computed(fleet)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=60, limits=limits) as http, asyncio.TaskGroup() as group:
        body = {**asks()[0].body(stream=True), "max_tokens": 10_000}

        async def listen(url: str) -> None:
            async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    pass

        leavers = [group.create_task(listen(fleet.urls[i % 2])) for i in range(200)]

        async def all_submitted() -> bool:
            queued = await bus._redis.xlen(bus.keys.sub("interactive"))
            running = [len(await bus.work_of(wid)) for wid in await bus.members.ids(bus.keys.workers)]
            return queued + sum(running) >= 200 or await num_computed(fleet) > before

        await wait_until(all_submitted, "they run or wait")
        for leaver in leavers:
            leaver.cancel()
        at_their_end = await num_computed(fleet)
        call = await ask_once(fleet, asks()[1])
    assert call.attempts[-1].text == right[asks()[1]]
    await wait_until(lambda: is_idle(fleet), "nothing of them is left")
    assert await num_computed(fleet) - at_their_end < 200 * 10_000 / 20
    await wait_until(lambda: has_free_blocks(fleet), "their memory is free")


async def test_the_store_may_be_down_while_what_is_resident_is_asked_for(
    fleet: ProcessFleet, right: dict[Ask, str]
) -> None:
    digests = [alias.digest for alias in await fleet.bus.adapters.aliases()]
    for beat in await beats(fleet):  # otherwise a worker that has just become free would have to fetch them
        await fleet.bus.streams.tell([(beat.wid, m.Control(kind="prefetch", digest=digest)) for digest in digests])
    await wait_until(lambda: have_all(fleet, digests), "every worker has every adapter")
    fleet.kill("store")
    calls = await asyncio.gather(*(ask_once(fleet, ask) for ask in asks()))
    assert {call.ask: call.attempts[0].text for call in calls} == right


async def test_a_standby_leads_when_the_leader_is_killed(fleet: ProcessFleet, right: dict[Ask, str]) -> None:
    bus = fleet.bus
    token = (await bus._redis.get(bus.keys.leader)).decode()
    leader = next(member for member in fleet.members.values() if f"-{member.pid}-" in token)
    fleet.kill(leader.name)
    # The lease lasts LEASE_MS = 2.5 s and standbys try every 0.25 s, see tests/scheduler: here it must only happen.
    calls = await asyncio.gather(*(ask_once(fleet, ask) for ask in asks()))
    assert {call.ask: call.attempts[0].text for call in calls} == right
    assert (await bus._redis.get(bus.keys.leader)).decode() != token


async def beats(fleet: ProcessFleet) -> list[m.WorkerBeat]:
    return [beat for beat in (await fleet.bus.members.worker_beats()).values() if beat is not None]


async def num_computed(fleet: ProcessFleet) -> int:
    return sum(beat.counters.num_output_tokens for beat in await beats(fleet))


async def have_all(fleet: ProcessFleet, digests: list[str]) -> bool:
    return all({*digests} <= {*beat.resident} for beat in await beats(fleet))


async def has_free_blocks(fleet: ProcessFleet) -> bool:
    return all(beat.running == 0 and beat.waiting == 0 for beat in await beats(fleet))


async def is_idle(fleet: ProcessFleet) -> bool:
    bus = fleet.bus
    queued = [await bus._redis.xlen(bus.keys.sub(cls)) for cls in ("interactive", "batch")]
    return not any(queued) and not any([await bus.work_of(wid) for wid in await bus.members.ids(bus.keys.workers)])
