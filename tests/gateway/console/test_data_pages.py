"""Requests with filters, batches from upload to download, and usage as chart and file."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import httpx2
import pytest
from helpers.browser import REASON, Tab
from helpers.script_queue import make_body, make_submit
from helpers.scripted_fleet import Script, ScriptedFleet
from helpers.waiting import wait_until

from protocol.queue.bus import Bus, now_ms
from protocol.wire.errors import WorkerLost

pytest.importorskip("playwright.async_api", reason=REASON)

DAY_MS = 86_400_000


async def saved_text(download: Any) -> str:
    """Return the text of a downloaded file."""
    return await asyncio.to_thread(Path(await download.path()).read_text)


async def rows(tab: Tab) -> set[str]:
    """Return the ids of the requests in the list."""
    return set(await tab.page.locator("tbody a.code").all_inner_texts())


async def test_filters_narrow_the_list_and_are_in_the_address(bus: Bus, fleet: ScriptedFleet, tab: Tab) -> None:
    fleet.assigning.clear()
    for number, tenant in enumerate(("acme", "acme", "globex")):
        await bus.submit("interactive", [(make_submit(f"r{number}", tenant=tenant), make_body())], max_queued=10)
    asked: list[dict[str, Any]] = []
    await tab.enter()
    tab.page.on("request", lambda one: asked.append(parse_qs(urlparse(one.url).query)))
    await tab.go("Requests")
    await tab.page.get_by_text("3 requests", exact=True).wait_for()
    for label, value, shown in (
        ("Tenant", "acme", {"r0", "r1"}),
        ("Search (ID, worker, error)", "R1", {"r1"}),
    ):
        await tab.page.get_by_label(label).fill(value)
        await tab.page.keyboard.press("Enter")
        await tab.page.get_by_text(re.compile(rf"^{len(shown)} requests?$")).wait_for()
        assert await rows(tab) == shown
    assert tab.page.url.endswith("#/requests?tenant=acme&q=R1")
    wanted = {"tenant": ["acme"], "q": ["R1"], "limit": ["100"]}
    await wait_until(lambda: wanted in asked, "the gateway is asked for what was typed")
    await tab.page.reload()
    await tab.page.get_by_text("1 request", exact=True).wait_for()
    await tab.page.get_by_role("link", name="r1").click()
    await tab.page.get_by_role("dialog").get_by_role("button", name="Close").click()
    assert tab.page.url.endswith("#/requests?tenant=acme&q=R1")  # closing keeps the filters
    await tab.page.get_by_role("button", name="Clear filters").click()
    await tab.page.get_by_text("3 requests", exact=True).wait_for()
    await tab.page.get_by_label("Result").select_option("failed")
    await tab.page.get_by_text("No request matches the filters.").wait_for()
    await tab.page.goto(f"{tab.url}/console/#/requests?state=queued&span=3600")
    await tab.page.get_by_text("3 requests", exact=True).wait_for()
    await wait_until(
        lambda: any(one.get("state") == ["queued"] and "since" in one for one in asked),
        "the gateway is asked for those",
    )
    await tab.page.get_by_label("Model or adapter").fill("sql")
    await tab.page.keyboard.press("Enter")
    await tab.page.get_by_text("No request matches the filters.").wait_for()
    await wait_until(lambda: any(one.get("model") == ["sql"] for one in asked), "the gateway is asked for the model")
    await tab.page.goto(f"{tab.url}/console/#/requests?span=custom&from=2001-01-01T00:00&to=2001-01-02T00:00")
    await tab.page.get_by_text("No request matches the filters.").wait_for()
    await wait_until(lambda: any("until" in one for one in asked), "the gateway is asked for the times")
    (span,) = {(one["since"][0], one["until"][0]) for one in asked if "until" in one}
    assert int(span[1]) - int(span[0]) == DAY_MS


async def test_an_error_is_shown_in_the_list_as_the_gateway_gives_it(fleet: ScriptedFleet, tab: Tab) -> None:
    one = {
        "id": "r1", "call": "r1", "state": "refused", "finish": None, "status": 429, "tenant": "acme", "class": None,
        "model": "sql", "adapter": None, "worker": "w7", "prompt_tokens": 0, "output_tokens": 0, "attempts": 0,
        "submitted_ms": 1_796_000_000_000, "first_ms": None, "ended_ms": 1_796_000_000_500,
        "error": {"message": "too many tokens", "code": "rate_limit_exceeded"},
    }  # fmt: skip
    page = {"object": "list", "data": [one], "has_more": False, "last_id": None}
    await tab.page.route("**/v1/requests?*", lambda route: route.fulfill(json=page))
    await tab.enter()
    await tab.go("Requests")
    row = tab.page.get_by_role("row").filter(has_text="r1")
    for text in ("refused", "sql", "acme", "w7", "429: too many tokens – rate_limit_exceeded", "500 ms"):
        await row.get_by_text(text, exact=True).wait_for()
    await tab.page.get_by_label("Search").fill("TOO MANY")
    await tab.page.keyboard.press("Enter")
    await row.wait_for()


async def test_a_batch_is_uploaded_followed_and_downloaded(fleet: ScriptedFleet, tab: Tab, tmp_path: Path) -> None:
    def script(submit: Any, body: Any) -> Script:
        return Script(text="fine") if len(body.prompt) > 20 else Script(error=WorkerLost("its worker died"))

    fleet.script = script
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": "base", "prompt": prompt}}
        for name, prompt in (("good", "the quick brown fox jumps over the lazy dog"), ("bad", "x"))
    ]
    path = tmp_path / "calls.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    await tab.enter()
    await tab.go("Batches")
    await tab.page.get_by_role("button", name="New batch…").click()
    dialog = tab.page.get_by_role("dialog")
    await dialog.get_by_label("a file").set_input_files(path)
    await dialog.get_by_text("calls.jsonl").wait_for()
    assert await dialog.get_by_label("Endpoint").input_value() == "/v1/completions"  # the endpoint of the first line
    await dialog.get_by_role("button", name="Start batch").click()
    await tab.said("was started.")
    await dialog.get_by_text("completed").wait_for(timeout=25_000)
    await dialog.get_by_text("2 of 2").wait_for()
    assert "#/batches/batch_" in tab.page.url
    found: dict[str, str] = {}
    for title in ("Download answers", "Download errors", "Download input"):
        async with tab.page.expect_download() as saved:
            await dialog.get_by_role("button", name=title).click()
        download = await saved.value
        found[title] = await saved_text(download)
        assert download.suggested_filename.endswith(".jsonl")
    (answer,) = [json.loads(line) for line in found["Download answers"].splitlines()]
    assert (answer["custom_id"], answer["response"]["body"]["choices"][0]["text"]) == ("good", "fine")
    (error,) = [json.loads(line) for line in found["Download errors"].splitlines()]
    assert error["custom_id"] == "bad"
    assert found["Download input"] == path.read_text()


async def test_a_file_that_is_wrong_says_where(fleet: ScriptedFleet, tab: Tab, tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text("{}\nno json\n")
    await tab.enter()
    await tab.go("Batches")
    await tab.page.get_by_role("button", name="New batch…").click()
    dialog = tab.page.get_by_role("dialog")
    await dialog.get_by_label("a file").set_input_files(path)
    await dialog.get_by_role("button", name="Start batch").click()
    await dialog.get_by_text("Line 2:").wait_for(timeout=25_000)
    await dialog.get_by_text("failed").first.wait_for()


async def test_usage_is_a_chart_and_a_file(bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, tab: Tab) -> None:
    await fleet.add_adapter("sql", "d" * 64)
    for model in ("sql", "base", "sql"):
        assert (await http.post("/v1/completions", json={"model": model, "prompt": "dog", "max_tokens": 4})).is_success
    await tab.enter()
    await tab.page.goto(f"{tab.url}/console/#/usage?by=model&metric=num_model_requests")
    chart = tab.page.get_by_role("img")
    await chart.wait_for()
    label = await chart.get_attribute("aria-label")
    assert label.startswith("Requests per day (UTC), latest values: sql 2, ")
    box = await tab.page.locator(".u-over").bounding_box()
    await tab.page.mouse.move(box["x"] + box["width"] * 6.5 / 7, box["y"] + 9)  # over the last of seven days
    day = time.strftime("%Y-%m-%d", time.gmtime(now_ms() / 1000))  # in UTC, whatever the time zone of the browser
    await tab.page.locator(".u-legend").get_by_text(day).wait_for()
    async with tab.page.expect_download() as saved:
        await tab.page.get_by_role("button", name="Export CSV").click()
    download = await saved.value
    assert download.suggested_filename == "usage-by-model.csv"
    found = list(csv.DictReader(io.StringIO(await saved_text(download))))
    assert {row["model"]: int(row["num_model_requests"]) for row in found}["sql"] == 2
    await tab.page.get_by_label("Group by").select_option("adapter")
    await tab.page.get_by_text("base model").first.wait_for()
    await tab.page.get_by_label("Days").select_option("31")
    await chart.wait_for()
    assert tab.page.url.endswith("#/usage?by=adapter&metric=num_model_requests&days=31")


async def test_what_has_ended_is_not_asked_for_again(fleet: ScriptedFleet, http: httpx2.AsyncClient, tab: Tab) -> None:
    """Except for five seconds, in which the stored text may still arrive."""
    done = (await http.post("/v1/completions", json={"model": "base", "prompt": "the dog", "max_tokens": 6})).json()
    lists: list[str] = []
    timelines: list[str] = []
    await tab.enter()
    tab.page.on("request", lambda one: (timelines if "/v1/requests/" in one.url else lists).append(one.url))
    await tab.page.goto(f"{tab.url}/console/#/requests/{done['id']}")
    await tab.page.get_by_role("dialog").get_by_text("completed").first.wait_for()
    lists.clear()
    await wait_until(lambda: len(lists) >= 3, "the list behind it is asked for, every four seconds")
    num_asked = len(timelines)
    lists.clear()
    await wait_until(lambda: len(lists) >= 2, "the list goes on being asked for")
    assert len(timelines) == num_asked


async def test_a_search_without_a_match_reads_ten_pages(fleet: ScriptedFleet, tab: Tab) -> None:
    asked: list[str] = []

    async def answer(route: Any) -> None:
        asked.append(route.request.url)
        page = {"object": "list", "data": [], "has_more": True, "last_id": f"ended:{len(asked)}-1/{'0' * 12}"}
        await route.fulfill(json=page)

    await tab.enter()
    await tab.page.route("**/v1/requests?*", answer)
    await tab.page.goto(f"{tab.url}/console/#/requests?q=nobody")
    await tab.page.get_by_text("0 requests, older ones were not searched").wait_for()
    assert len(asked) % 10 == 0
    assert len(asked) <= 20, "of two polls at most"


async def test_a_kept_prompt_and_output_are_shown_as_text(
    fleet: ScriptedFleet, http: httpx2.AsyncClient, tab: Tab
) -> None:
    done = (await http.post("/v1/completions", json={"model": "base", "prompt": "the dog", "max_tokens": 6})).json()
    kept = {"prompt": "<b>the dog</b>", "output": "sleeps\nin", "is_cut": True, "problem": None}
    texts = iter((None, kept))  # available about a second after the end

    async def answer(route: Any) -> None:
        found = await route.fetch()
        await route.fulfill(json={**await found.json(), "text": next(texts, kept)})

    await tab.enter()
    await tab.page.route("**/v1/requests/*", answer)
    await tab.page.goto(f"{tab.url}/console/#/requests/{done['id']}")
    dialog = tab.page.get_by_role("dialog")
    await dialog.get_by_text("<b>the dog</b>", exact=True).wait_for()
    assert await dialog.locator("pre").all_inner_texts() == ["<b>the dog</b>", "sleeps\nin"]
    await dialog.get_by_text("Too long to be kept whole", exact=False).wait_for()
