"""Charts: each count is in all ranges that cover it, tenants see only their own, and memory is bounded."""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers.clocks import SetClock
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from gateway.calls.observe import SERIES
from gateway.fleet import timeseries
from gateway.fleet.timeseries import (
    BOUNDS_MS,
    MAX_BYTES,
    MAX_GROUPS,
    MAX_NAME,
    MAX_OPEN_ROWS,
    MAX_ROWS,
    MAX_TENANTS,
    OTHER,
    RANGES_S,
    TIERS,
    FleetSample,
    TimeSeries,
    quantile,
)  # fmt: skip
from gateway.overload.loop_slice import STEPS
from protocol.queue.bus import Bus
from protocol.wire.errors import WorkerLost

START_S = 1_800_000 * 1000  # a multiple of all bucket lengths


def total(answer: dict[str, Any], what: str = "requests", name: str | None = None) -> int:
    (group,) = [one for one in answer["groups"] if one["name"] == name]
    return sum(value or 0 for value in group[what])


@pytest.mark.parametrize("span", RANGES_S)
async def test_a_range_has_what_happened_in_it_and_nothing_older(span: str) -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    range_s = RANGES_S[span]
    step = next(step for step, num in TIERS if step * num >= range_s)
    per_step = 3
    num_steps = 2 * range_s // step
    for number in range(num_steps):
        for part in range(per_step):
            clock.now_s = START_S + step * number + step * part / per_step
            series.count("acme", "sql", "requests")
    answer = await series.read(range_s, None, None)
    assert answer["step_s"] == step
    assert answer["elapsed_s"] == max(1, step * (per_step - 1) // per_step)
    assert answer["num"] == range_s // step == len(answer["groups"][0]["requests"])
    assert answer["start_time"] == START_S + num_steps * step - range_s
    assert answer["groups"][0]["requests"] == [per_step] * answer["num"]


AFTER_S = (0, 5, 10, 295, 300, 305, 310, 315)  # seconds since buckets of all lengths started


@pytest.mark.parametrize("span", RANGES_S)
async def test_a_bucket_that_ends_keeps_what_it_counted(span: str) -> None:
    range_s = RANGES_S[span]
    step = next(step for step, num in TIERS if step * num >= range_s)
    every_s = 5
    for after_s in AFTER_S:
        clock = SetClock(START_S)
        series = TimeSeries(clock)
        for clock.now_s in range(START_S, START_S + 2 * TIERS[-1][0] + after_s + 1, every_s):
            series.count("acme", "sql", "requests")
            series.sample(FleetSample(output_tokens=7))
        answer = await series.read(range_s, None, None)
        since_s = after_s % step
        num_full = min(answer["num"] - 1, (2 * TIERS[-1][0] + after_s) // step)
        requests = [step // every_s] * num_full + [since_s // every_s + 1]
        assert answer["groups"][0]["requests"] == [None] * (answer["num"] - len(requests)) + requests, after_s
        assert answer["fleet"]["output_tokens"][-len(requests) :] == [7 * num for num in requests]
        assert answer["elapsed_s"] == max(1, since_s)


async def test_buckets_from_before_a_pause_are_where_they_were() -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    series.count("acme", "sql", "requests", 3)
    clock.now_s += 7200
    day = await series.read(86_400, None, None)
    assert day["groups"][0]["requests"][-25:] == [3] + [None] * 23 + [0]
    assert total(await series.read(3600, None, None)) == 0
    clock.now_s += 8 * 86_400
    assert total(await series.read(604_800, None, None)) == 0


async def test_what_ends_while_it_is_read_is_counted_once() -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    for number in range(MAX_OPEN_ROWS):
        clock.now_s = START_S + TIERS[-1][0] - 400 + 390 * number // MAX_OPEN_ROWS
        series.count("acme", f"adapter-{number}", "requests")
    clock.now_s = START_S + TIERS[-1][0] - 1
    reading = [asyncio.create_task(series.read(range_s, None, "model")) for range_s in RANGES_S.values()]
    while not all(task.done() for task in reading):
        await asyncio.sleep(0)
        clock.now_s += 10
        series.sample(FleetSample())
    assert [total(await task) for task in reading] == [MAX_OPEN_ROWS] * len(reading)


async def test_before_the_gateway_ran_there_is_nothing_and_not_zero() -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    series.sample(FleetSample(queued=3, running=2, workers=1, output_tokens=50))
    clock.now_s += 10
    series.sample(FleetSample(queued=1, running=4, workers=2, output_tokens=70))
    answer = await series.read(900, None, None)
    assert answer["groups"][0]["requests"] == [None] * 88 + [0, 0]
    assert answer["fleet"]["queued"][-3:] == [None, 3, 1]
    assert answer["fleet"]["output_tokens"][-2:] == [50, 70]
    day = await series.read(86_400, None, None)
    assert (day["fleet"]["queued"][-1], day["fleet"]["running"][-1], day["fleet"]["output_tokens"][-1]) == (3, 4, 120)
    assert day["fleet"]["workers"][-2:] == [None, 2]


async def test_a_clock_that_goes_back_loses_nothing() -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    clock.now_s += 100
    series.count("a", "m", "requests")
    clock.now_s -= 70
    series.count("a", "m", "requests")
    assert total(await series.read(900, None, None)) == 2


async def test_a_tenant_sees_its_own_calls_and_nothing_of_the_fleet() -> None:
    series = TimeSeries(SetClock(START_S))
    series.count("acme", "sql", "requests", 2)
    series.count("globex", "sql", "requests", 40)
    series.count("globex", "secret", "refused", 5)
    series.sample(FleetSample(queued=9))
    answer = await series.read(900, "acme", "model")
    assert answer["fleet"] is None
    assert [group["name"] for group in answer["groups"]] == [None, "sql"]
    assert total(answer) == total(answer, name="sql") == 2
    assert total(answer, "refused") == 0
    assert total(await series.read(900, None, "tenant"), "refused", "globex") == 5


async def test_the_busiest_are_apart_and_the_others_are_counted_together() -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    for number in range(MAX_ROWS + 9):
        series.count("acme", f"adapter-{number}", "requests", number + 1)
    for minutes in (0, 61):  # in an open bucket, and in one that was merged into a longer one
        clock.now_s += 60 * minutes
        answer = await series.read(86_400, None, "model")
        names = [group["name"] for group in answer["groups"]]
        top = [f"adapter-{MAX_ROWS + 8 - number}" for number in range(MAX_GROUPS)]
        assert names == [None, *top, OTHER]
        everything = sum(range(1, MAX_ROWS + 10))
        assert total(answer) == everything
        assert total(answer, name=OTHER) == everything - sum(total(answer, name=name) for name in top)


async def test_sums_are_exact_where_full_buckets_are_put_together() -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    for bucket in range(2):
        clock.now_s = START_S + 10 * bucket
        for number in range(MAX_OPEN_ROWS):  # the least busy come first, so the rest of a kept bucket is first
            series.count("acme", f"adapter-{number}", "requests", number + 1)
    for tenant in (None, "acme"):
        for range_s in RANGES_S.values():
            assert total(await series.read(range_s, tenant, "model")) == MAX_OPEN_ROWS * (MAX_OPEN_ROWS + 1)


@pytest.mark.parametrize("tenant", [OTHER, "", "None", "null", "\0", "public"])
@pytest.mark.parametrize("group", ["tenant", "model", None])
async def test_no_name_shows_what_others_did(tenant: str, group: timeseries.Group | None) -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    for number in range(3 * MAX_OPEN_ROWS):  # more tenants than have rows of their own
        series.count(f"tenant-{number}", tenant, "requests", 5)
    for minutes in (0, 1, 61):
        clock.now_s += 60 * minutes
        answer = await series.read(86_400, tenant, group)
        assert total(answer) == 0
        assert [group["name"] for group in answer["groups"]] == [None]
    series.count(tenant, OTHER, "requests", 9)
    series.count(tenant, "sql", "requests", 2)
    answer = await series.read(86_400, tenant, group)
    assert total(answer) == 11
    if group == "model":
        assert (total(answer, name="sql"), total(answer, name=OTHER)) == (2, 9)


@pytest.mark.parametrize("what", ["requests", "refused", "client_errors"])
async def test_one_busy_tenant_hides_nothing_of_another(what: timeseries.Field) -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    num_buckets = 40
    for _ in range(num_buckets):
        series.count("small", "sql", "requests")
        for number in range(2 * MAX_OPEN_ROWS):
            series.count("acme", f"adapter-{number}", what, 50)
        series.count("small", "chat", "requests")
        series.count("small", "chat", "output_tokens", 8)
        clock.now_s += 10
    for range_s in RANGES_S.values():
        answer = await series.read(range_s, "small", "model")
        assert [group["name"] for group in answer["groups"]] in ([None, "sql", "chat"], [None, "chat", "sql"])
        assert total(answer) == 2 * num_buckets
        assert total(answer, name="sql") == total(answer, name="chat") == num_buckets
        assert total(answer, "output_tokens", "chat") == 8 * num_buckets
        everybody = await series.read(range_s, None, "tenant")
        assert total(everybody, what, "acme") == num_buckets * 2 * MAX_OPEN_ROWS * 50


async def test_a_tenant_that_is_not_kept_apart_has_no_number_and_not_zero() -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    series.count("small", "sql", "requests")
    clock.now_s += 10
    series.count("small", "sql", "requests")
    for number in range(MAX_ROWS):
        series.count(f"tenant-{number}", "sql", "requests", 2 + (number < MAX_TENANTS))
    clock.now_s += 10
    series.count("tenant-0", "sql", "requests")
    answer = await series.read(900, "small", None)
    assert answer["groups"][0]["requests"][-4:] == [None, 1, None, 0]
    assert answer["groups"][0]["ttft_p95_ms"][-2:] == [None, None]
    everybody = await series.read(900, None, "tenant")
    assert total(everybody) == 2 + 2 * MAX_ROWS + MAX_TENANTS + 1
    assert (await series.read(900, "tenant-3", None))["groups"][0]["requests"][-3:] == [0, 3, 0]


READERS: tuple[tuple[str | None, timeseries.Group], ...] = ((None, "tenant"), (None, "model"), ("3", "model"))


async def test_a_turn_of_a_read_adds_few_rows() -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    for bucket in range(400):
        clock.now_s = START_S + 10 * bucket
        for number in range(MAX_OPEN_ROWS if bucket > 390 else MAX_ROWS):
            series.count(f"{number % (2 * MAX_TENANTS)}", f"{bucket}-{number}", "requests")
    num_sums, most = 0, 0

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal num_sums
        num_sums += event == "call" and frame.f_code is timeseries._sum.__code__

    for tenant, group in READERS:
        for range_s in RANGES_S.values():
            task = asyncio.create_task(series.read(range_s, tenant, group))
            sys.setprofile(watch)
            try:
                while not task.done():
                    before = num_sums
                    await asyncio.sleep(0)
                    most = max(most, num_sums - before)
            finally:
                sys.setprofile(None)
            assert total(task.result()) > 0
    assert 0 < most <= MAX_OPEN_ROWS + STEPS * MAX_ROWS


def test_a_quantile_is_between_the_bounds_of_its_calls() -> None:
    counts = [0] * (len(BOUNDS_MS) + 1)
    assert quantile(counts, 0.5) is None
    counts[3] = 10  # from 35 to 60 ms
    assert quantile(counts, 0.5) == 47.5
    assert quantile(counts, 1.0) == 60
    counts[-1] = 90
    assert quantile(counts, 0.95) == BOUNDS_MS[-1]


async def test_first_tokens_are_counted_within_their_bounds() -> None:
    series = TimeSeries(SetClock(START_S))
    for ms in (50, 50, 50, 60_001):
        series.first_token("acme", "sql", ms / 1000)
    answer = await series.read(900, None, None)
    assert 35 <= answer["groups"][0]["ttft_p50_ms"][-1] <= 60
    assert answer["groups"][0]["ttft_p95_ms"][-1] == BOUNDS_MS[-1]


async def test_names_that_strangers_choose_fill_twelve_megabytes_at_most() -> None:
    clock = SetClock(START_S)
    series = TimeSeries(clock)
    tracemalloc.start()
    try:
        for bucket in range(sum(num for _, num in TIERS)):
            for number in range(2 * (MAX_TENANTS + 1)):  # each name is new and longer than the limit
                tenant = f"{bucket}-{number % (MAX_TENANTS + 1)}" + "t" * 2000
                series.count(tenant, f"{bucket}-{number}" + "m" * 2000, "requests")
            clock.now_s += TIERS[-1][0]  # closes a bucket of each tier
        num_bytes = tracemalloc.get_traced_memory()[0]
        for number in range(MAX_OPEN_ROWS):
            series.count(f"{number}" + "t" * 2000, f"{number}" + "m" * 2000, "requests")
        added = tracemalloc.get_traced_memory()[0] - num_bytes
    finally:
        tracemalloc.stop()
    assert 5_000_000 < num_bytes + 2 * added < MAX_BYTES  # open buckets of the other tiers may be as full
    answer = await series.read(900, None, "tenant")
    assert all(len(group["name"] or "") <= MAX_NAME for group in answer["groups"])


async def test_the_route_shows_calls_errors_and_refusals_to_whom_they_belong(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    keys = {
        name: (await bus.api_keys.create(name, [scope]))[0]
        for name, scope in (("charts-mine", "infer"), ("charts-other", "infer"), ("charts-ops", "admin"))
    }
    heads = {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}
    await fleet.add_adapter("sql", "d" * 64)
    async with gateway_client(bus, model_folder, api_keys=True) as http:

        async def ask(model: str, status: int) -> None:
            body = {"model": model, "prompt": "the dog", "max_tokens": 6}
            assert (await http.post("/v1/completions", json=body, headers=heads["charts-mine"])).status_code == status

        async def read(name: str, **query: str) -> dict[str, Any]:
            answer = await http.get("/v1/timeseries", params=query, headers=heads[name])
            assert answer.status_code == 200, answer.text
            return answer.json()

        await ask("sql", 200)
        await ask("base", 200)
        await ask("nobody", 404)
        fleet.script = lambda submit, body: Script(error=WorkerLost("its worker died"))
        await ask("sql", 500)

        async def is_counted() -> bool:  # which happens after the last bytes of an answer
            return total(await read("charts-mine"), "server_errors") == 1

        await wait_until(is_counted, "the failed call is counted", every_s=0.1)  # reads per second are limited
        mine = await read("charts-mine", group_by="model")
        assert (total(mine), total(mine, "client_errors"), total(mine, "output_tokens")) == (3, 1, 18)
        assert total(mine, name="sql") == 2
        assert any(value is not None for value in mine["groups"][0]["ttft_p50_ms"])
        other = await read("charts-other", group_by="model")
        assert (other["fleet"], len(other["groups"]), total(other)) == (None, 1, 0)
        SERIES.count("charts-mine", "", "refused", 1_000_000)  # busier than all tenants of earlier tests
        everything = await read("charts-ops", group_by="tenant", range="24h")
        assert total(everything, name="charts-mine") == 3

        async def is_sampled() -> bool:
            return (await read("charts-ops"))["fleet"]["workers"][-1] == 1

        await wait_until(is_sampled, "the fleet is sampled", every_s=0.1)
        assert everything["gateways"] >= 1
        for query in ({"range": "2h"}, {"group_by": "secret"}):
            assert (await http.get("/v1/timeseries", params=query, headers=heads["charts-ops"])).status_code == 400
        assert (await http.get("/v1/timeseries")).status_code == 401
