"""Recorded usage equals what clients were told in answers: with the official client, as CSV, and by tenant."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import httpx2
import pytest
from helpers.scripted_fleet import ScriptedFleet, gateway_client, running_gateway
from helpers.waiting import wait_until
from openai import AsyncOpenAI

from gateway.books.usage import MAX_RESULTS, Day, Query, csv_text, page
from protocol.queue.books.api_keys import ApiKeys
from protocol.queue.books.usage import DAY_S, UsageRow
from protocol.queue.bus import Bus, now_ms
from protocol.wire.errors import BadRequest

ROW = UsageRow("acme", "sql", "d1", "tiny", False, 1, 10, 4, 5)


def today() -> int:
    return now_ms() // (DAY_S * 1000)


async def test_the_official_client_reads_what_it_was_told(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    keys = ApiKeys(bus._redis, bus.keys)
    mine, other, ops = [(await keys.create(name, [scope]))[0] for name, scope in
                        (("mine", "infer"), ("other", "infer"), ("ops", "admin"))]  # fmt: skip
    async with running_gateway(bus, model_folder, api_keys=True) as gateway:
        url = f"{gateway.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key=mine, admin_api_key=mine) as client:
            told = [
                (await client.completions.create(model="base", prompt=text, max_tokens=4, n=n)).usage
                for text, n in (("one", 1), ("another", 3))
            ]
            stream = await client.chat.completions.create(
                model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            told += [chunk.usage async for chunk in stream if chunk.usage]
            found = await client.admin.organization.usage.completions(
                start_time=today() * DAY_S, group_by=["project_id", "model", "batch"], bucket_width="1d"
            )
            (result,) = found.data[0].results
            assert found.has_more is False
            assert result.object == "organization.usage.completions.result"
            assert (result.project_id, result.batch, result.num_model_requests) == ("mine", False, 3)
            assert result.input_tokens == sum(usage.prompt_tokens for usage in told if usage)
            assert result.output_tokens == sum(usage.completion_tokens for usage in told if usage)
        async with httpx2.AsyncClient(base_url=url, timeout=60) as http:

            async def ask(key: str, **query: object) -> httpx2.Response:
                params = {"start_time": today() * DAY_S, **query}
                return await http.get("/usage", params=params, headers={"authorization": f"Bearer {key}"})

            (bucket,) = (await ask(other)).json()["data"]
            assert bucket["results"] == []
            (bucket,) = (await ask(ops, group_by=["project_id", "model"])).json()["data"]
            assert [one["project_id"] for one in bucket["results"]] == ["mine"]
            assert bucket["results"][0]["num_model_requests"] == 3
            assert (await ask(other, project_ids="mine")).status_code == 403
            assert (await ask(ops, project_ids="other")).json()["data"][0]["results"] == []


async def test_csv_has_a_line_for_each_result(bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={"model": "base", "prompt": "one", "max_tokens": 4})
    used = answer.json()["usage"]
    start = {"start_time": today() * DAY_S, "group_by": "model"}
    for asked in (
        await http.get("/v1/usage", params=start | {"format": "csv"}),
        await http.get("/v1/usage", params=start, headers={"accept": "text/csv"}),
    ):
        assert asked.headers["content-type"].startswith("text/csv")
        (line,) = csv.DictReader(io.StringIO(asked.text))
        assert (line["num_model_requests"], line["input_tokens"]) == ("1", str(used["prompt_tokens"]))
        assert line["output_tokens"] == str(used["completion_tokens"])


async def test_a_call_whose_client_left_before_it_began_does_not_count(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    body = {"model": "base", "prompt": "one", "max_tokens": 40, "stream": True}
    fleet.assigning.clear()
    async with (
        gateway_client(bus, model_folder, keepalive_s=0.05) as http,
        http.stream("POST", "/v1/completions", json=body),
    ):
        pass

    async def has_ended() -> bool:
        return not await bus.unfinished() and await bus.history.tenants() == ["public"]

    await wait_until(has_ended, "the call has ended")
    assert await bus.usage.rows(today(), "public") == []  # no prompt had been computed


async def test_background_jobs_are_no_batches(bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient) -> None:
    body = {"model": "base", "prompt": "one", "max_tokens": 4, "background": True}
    job = (await http.post("/v1/completions", json=body)).json()
    done = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=20"})).json()
    (row,) = await bus.usage.rows(today(), "public")
    assert (row.batch, row.requests) == (False, 1)
    assert row.output_tokens == done["result"]["usage"]["completion_tokens"]


async def test_what_is_not_served_is_named(subtests: pytest.Subtests, http: httpx2.AsyncClient) -> None:
    for query, param in [
        ({}, "start_time"),
        ({"start_time": "yesterday"}, "start_time"),
        ({"start_time": "-1"}, "start_time"),
        ({"start_time": "1" * 20}, "start_time"),
        ({"start_time": "1", "end_time": "x"}, "end_time"),
        ({"start_time": "1", "bucket_width": "1h"}, "bucket_width"),
        ({"start_time": "1", "group_by": "user_id"}, "group_by"),
        ({"start_time": "1", "group_by[]": "colour"}, "group_by"),
        ({"start_time": "1", "user_ids[]": "u"}, "user_ids"),
        ({"start_time": "1", "api_key_ids": "k"}, "api_key_ids"),
        ({"start_time": "1", "limit": "32"}, "limit"),
        ({"start_time": "1", "page": "2"}, "page"),
        ({"start_time": "1", "batch": "maybe"}, "batch"),
        ({"start_time": "1", "format": "xml"}, "format"),
        ({"start_time": "1", "colour": "red"}, "colour"),
    ]:
        with subtests.test(query=query, param=param):
            answer = await http.get("/v1/usage", params=query)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param


async def test_pages_go_on_day_by_day(bus: Bus, http: httpx2.AsyncClient) -> None:
    query = {"start_time": (today() - 4) * DAY_S + 60, "limit": 2}
    days: list[int] = []
    while True:
        answer = (await http.get("/v1/usage", params=query)).json()
        days += [bucket["start_time"] // DAY_S for bucket in answer["data"]]
        if not answer["has_more"]:
            break
        query["page"] = answer["next_page"]
    assert days == list(range(today() - 4, today() + 1))
    assert answer["next_page"] is None


def test_rows_are_grouped_and_filtered() -> None:
    rows = [ROW, ROW, UsageRow("acme", "", "", "", True, 2, 1, 0, 1)]
    query = Query(0, 1, 7, ("model",))
    day = Day(0)
    day.add(rows, query)
    results = day.bucket(query)["results"]
    assert [(one["model"], one["num_model_requests"], one["output_tokens"]) for one in results] == [
        ("other", 2, 1), ("sql", 2, 10),
    ]  # fmt: skip
    assert {one["project_id"] for one in results} == {None}
    only = Query(0, 1, 7, models=frozenset({"sql"}), batch=False)
    day = Day(0)
    day.add(rows, only)
    assert [one["input_cached_tokens"] for one in day.bucket(only)["results"]] == [8]


def test_time_in_pools_is_told_by_adapter_or_in_all() -> None:
    for group_by, expected in (((), [7.5]), (("adapter",), [2.5, 5.0])):
        query = Query(0, 1, 7, group_by)
        assert query.shows_residency
        day = Day(0, seconds={"d1": 2.5, "d2": 5.0})
        day.add([ROW], query)
        results = day.bucket(query)["results"]
        assert [one["adapter_seconds"] for one in results] == expected
        assert sum(one["num_model_requests"] for one in results) == 1
    assert not Query(0, 1, 7, ("project_id",)).shows_residency
    assert not Query(0, 1, 7, batch=True).shows_residency


def test_an_answer_is_bounded() -> None:
    query = Query(0, 1, 7, ("model",))
    day = Day(0)
    day.add([UsageRow("t", f"m{i}", "", "", False, 1, 1, 1, 1) for i in range(MAX_RESULTS + 1)], query)
    with pytest.raises(BadRequest) as refused:
        page([day], query)
    assert refused.value.code == "limit_exceeded"
    assert csv_text(page([], query)).count("\n") == 1
