"""Addresses, times, themes and small screens of the console; its display without a gateway and of empty lists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.browser import PHONE, REASON, WIDE, Tab, axe, running_browser
from helpers.script_queue import make_body, make_submit
from helpers.scripted_fleet import RunningGateway, ScriptedFleet, running_gateway
from helpers.waiting import wait_until

from gateway.calls import observe
from gateway.fleet.timeseries import FleetSample
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m

pytest.importorskip("playwright.async_api", reason=REASON)

PAGES = ("Adapters", "Requests", "Jobs", "Batches", "Dead letters", "Usage", "Tenants and keys")
TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


async def populate(bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient) -> dict[str, str]:
    """Create one of everything that can be opened; return the address of each."""
    await fleet.add_adapter("acme/sql", "d" * 64)
    body = {"model": "acme/sql", "prompt": "the dog", "max_tokens": 6}
    job = (await http.post("/v1/completions", json={**body, "background": True})).json()
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    file = {"file": ("calls.jsonl", json.dumps(line).encode())}
    given = (await http.post("/v1/files", data={"purpose": "batch"}, files=file)).json()
    wanted = {"input_file_id": given["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = (await http.post("/v1/batches", json=wanted)).json()
    letter = m.DeadLetter(reason="three workers died", submit=make_submit("r1"), ms=now_ms())
    entry = await bus._redis.xadd(bus.keys.dlq, {"b": m.encode(letter)})
    await bus._redis.expire(bus.keys.dlq, 600)
    fleet.assigning.clear()
    await bus.submit("interactive", [(make_submit("waits-0"), make_body())], max_queued=100)
    return {
        "Adapters": "adapters/acme%2Fsql",
        "Requests": "requests/waits-0",
        "Jobs": f"jobs/{job['id']}",
        "Batches": f"batches/{batch['id']}",
        "Dead letters": f"dead-letters/{entry.decode()}",
    }


async def test_everything_that_can_be_opened_has_an_address(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, tab: Tab
) -> None:
    await tab.enter()
    dialog = tab.page.get_by_role("dialog")
    for title, address in (await populate(bus, fleet, http)).items():
        await tab.page.goto(f"{tab.url}/console/#/{address}")
        await dialog.locator("dl, p").first.wait_for()
        assert await dialog.get_by_role("alert").count() == 0, address
        await tab.page.get_by_role("heading", level=1, name=title).wait_for()
        await dialog.get_by_role("button", name="Close").click()
        await dialog.wait_for(state="detached")
        page = address.partition("/")[0]
        assert tab.page.url.endswith(f"#/{page}")
        await tab.page.locator(f'tbody a[href^="#/{address.replace(":", "%3A")}"]').click()
        await dialog.wait_for()
        await tab.page.go_back()
        await dialog.wait_for(state="detached")
        await tab.page.go_forward()
        await dialog.wait_for()
        assert f"#/{address}" in tab.page.url
        await tab.page.keyboard.press("Escape")
        await dialog.wait_for(state="detached")
    await tab.page.goto(f"{tab.url}/console/#/jobs/job_none")
    await dialog.get_by_role("alert").filter(has_text="job_none").wait_for()


async def test_all_times_are_written_in_one_way(
    bus: Bus, fleet: ScriptedFleet, http: httpx2.AsyncClient, tab: Tab
) -> None:
    await tab.enter()
    for title, address in (await populate(bus, fleet, http)).items():
        await tab.page.goto(f"{tab.url}/console/#/{address}")
        await tab.page.get_by_role("dialog").locator("dl, p").first.wait_for()
        if title not in ("Adapters", "Dead letters"):
            await tab.page.locator("dialog time").first.wait_for()
        main = await tab.page.inner_text("main")
        for written in await tab.page.locator("time").all_inner_texts():
            assert TIME.fullmatch(written), (title, written)
        assert re.findall(r"\d+/\d+/\d+|\d ?[ap]m\b|\bago\b", main) == [], title


@pytest.mark.timeout(60)
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_in_what_is_opened(
    bus: Bus, fleet: ScriptedFleet, gateway: RunningGateway, http: httpx2.AsyncClient, scheme: str
) -> None:
    script = axe()
    addresses = [*(await populate(bus, fleet, http)).values(), "nope", "requests?span=custom", "requests/none"]
    wrong: dict[str, list[str]] = {}
    async with running_browser() as browser:
        for viewport in (WIDE, PHONE):
            tab = Tab(await browser.new_page(viewport=viewport, color_scheme=scheme), gateway.url)
            await tab.enter()
            await tab.page.evaluate(script)
            for address in addresses:
                await tab.page.goto(f"{tab.url}/console/#/{address}")
                await tab.page.locator("dialog dl, dialog p, main > p, main input").last.wait_for()
                if found := await tab.violations():
                    wrong[f"{address} {viewport['width']}"] = found
            assert tab.wrong == []
    assert wrong == {}


async def test_an_unknown_address_is_said_to_be_none(fleet: ScriptedFleet, tab: Tab) -> None:
    await tab.enter()
    await tab.page.goto(f"{tab.url}/console/#/nope")
    await tab.page.get_by_role("heading", level=1, name="Page not found").wait_for()
    await tab.page.get_by_text("nope").wait_for()
    assert await tab.page.locator("[aria-current]").count() == 0
    await tab.page.get_by_role("link", name="Go to the overview").click()
    await tab.page.get_by_role("heading", name="Overview").wait_for()


async def test_an_address_leads_to_nothing_but_its_own_kind(fleet: ScriptedFleet, tab: Tab) -> None:
    asked: list[str] = []
    await tab.enter()
    tab.page.on("request", lambda request: asked.append(request.url.removeprefix(tab.url)))
    for page in ("adapters", "jobs", "batches", "dead-letters"):
        asked.clear()
        await tab.page.goto(f"{tab.url}/console/#/{page}/..%2Ffleet")
        await tab.page.get_by_role("dialog").get_by_role("alert").wait_for()
        assert "/v1/fleet" not in asked, page
    await tab.page.goto(f"{tab.url}/console/#/playground?prompt=spend+money&model=base")
    await tab.page.get_by_role("button", name="Remove base").wait_for()
    assert fleet.seen == []  # a link fills in a prompt without sending it


async def test_empty_lists_say_so_and_have_no_headers(fleet: ScriptedFleet, tab: Tab) -> None:
    await tab.enter()
    for title in PAGES:
        await tab.go(title)
        await tab.page.locator(".empty").first.wait_for()
        assert await tab.page.locator("thead").count() == 0, title


async def test_of_a_gateway_that_is_gone_nothing_is_said_to_be_ready(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    async with running_browser() as browser:
        async with running_gateway(bus, model_folder) as gateway:
            tab = Tab(await browser.new_page(), gateway.url)
            await tab.enter()
            row = tab.page.get_by_role("row").filter(has=tab.page.get_by_role("rowheader", name="w1"))
            await row.get_by_text("ready").wait_for()
        await row.get_by_text("unknown").wait_for()
        assert await row.get_by_text("ready").count() == 0
        alert = tab.page.get_by_role("alert").first
        assert TIME.search(await alert.inner_text())
        assert "can't be reached" in await alert.inner_text()
        await tab.page.get_by_role("link", name="Adapters").click()
        await tab.page.get_by_role("alert").filter(has_text="can't be reached").wait_for()


async def test_charts_have_units_and_what_was_before_a_reload(fleet: ScriptedFleet, tab: Tab) -> None:
    sample = FleetSample(queued=7, running=3, workers=1, output_tokens=5000, computed_tokens=300, cached_tokens=100)
    observe.SERIES.sample(sample)
    for ms in (20, 30, 400):
        observe.SERIES.first_token("public", "sql", ms / 1000)
    observe.SERIES.count("public", "sql", "requests", 3)
    observe.SERIES.count("public", "sql", "hits", 3)
    observe.SERIES.count("public", "", "refused", 2)
    await tab.enter()
    await tab.page.get_by_role("button", name="24 hours").click()
    for _ in range(2):
        await tab.page.get_by_role("img", name=re.compile(r"^Queue, .*queued \d+ requests")).wait_for()
        await tab.page.get_by_role("img", name=re.compile(r"^Time to first token, .*p95 \S+ ms")).wait_for()
        await tab.page.get_by_role("img", name=re.compile(r"^Errors, .*\(429\) \S+ calls.min")).wait_for()
        await tab.page.get_by_role("img", name=re.compile(r"^Throughput, .*tokens.s")).wait_for()
        await tab.page.get_by_role("img", name=re.compile(r"^Requests by model, .*sql \S+ requests.min")).wait_for()
        await tab.page.get_by_role("img", name=re.compile(r"^Hit rate, .*adapter pool \S+ %")).wait_for()
        assert await tab.page.locator(".plot canvas").count() == 6
        await tab.page.reload()
    observe.SERIES.count("acme", "sql", "output_tokens", 900)
    await tab.page.get_by_label("Group by").select_option("tenant")
    await tab.page.get_by_label("Metric").select_option("tokens")
    await tab.page.get_by_role("img", name=re.compile(r"^Output tokens by tenant, .*public")).wait_for()
    async with tab.page.expect_response(re.compile(r"timeseries\?range=7d")) as asked:
        await tab.page.get_by_role("button", name="7 days").click()
    assert (await (await asked.value).json())["step_s"] == 1800
    assert tab.page.url.endswith("#/overview?range=7d&by=tenant&metric=tokens")
    await tab.page.get_by_role("button", name="15 min").click()  # ends with the last complete period of 10 s
    await tab.page.get_by_role("img", name=re.compile(r"^Queue, .*queued \d+ requests")).wait_for()


async def test_longer_ranges_need_a_prometheus_and_a_note_says_it_is_down(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    async with running_browser() as browser:
        async with running_gateway(bus, model_folder) as gateway:
            tab = Tab(await browser.new_page(), gateway.url)
            await tab.page.goto(f"{gateway.url}/console#/overview?range=30d")
            await tab.page.get_by_text("range 30d needs a Prometheus").wait_for()
            assert await tab.page.get_by_role("button", name="30 days").count() == 0
        async with running_gateway(bus, model_folder, prometheus_url="http://127.0.0.1:9") as gateway:
            tab = Tab(await browser.new_page(), gateway.url)
            await tab.enter()
            await tab.page.get_by_role("button", name="90 days").click()
            await tab.page.get_by_text("These are the last 7d of this gateway's own numbers").wait_for()
            await tab.page.get_by_role("img", name=re.compile("^Queue, ")).wait_for()
            await tab.page.get_by_role("button", name="1 hour").click()
            await tab.page.get_by_text("Prometheus").wait_for(state="detached")


async def test_charts_of_a_gateway_of_an_earlier_version_are_shown(fleet: ScriptedFleet, tab: Tab) -> None:
    """Behind a shared address, it may answer the page of a newer gateway, without the fields for ranges."""

    async def answer(route: Any) -> None:
        response = await route.fetch()
        told = await response.json()
        earlier = {name: value for name, value in told.items() if name not in ("ranges", "source", "note")}
        await route.fulfill(response=response, json=earlier)

    await tab.page.route("**/v1/timeseries?*", answer)
    await tab.enter()
    await tab.page.get_by_role("img", name=re.compile("^Queue, ")).wait_for()
    await tab.page.get_by_role("button", name="7 days").wait_for()


async def test_the_theme_is_kept_and_refresh_is_paused(fleet: ScriptedFleet, tab: Tab) -> None:
    asked: list[str] = []
    await tab.page.clock.install()
    await tab.enter()
    look = "() => getComputedStyle(document.body).backgroundColor"
    light = await tab.page.evaluate(look)
    await tab.page.get_by_label("Theme").select_option("dark")
    dark = await tab.page.evaluate(look)
    assert dark != light
    await tab.page.reload()
    await tab.page.get_by_role("rowheader", name="w1").wait_for()
    assert await tab.page.evaluate(look) == dark
    await tab.page.get_by_role("button", name="Pause").click()
    tab.page.on("request", lambda request: asked.append(request.url))
    await tab.page.clock.run_for(120_000)
    assert asked == []
    await tab.page.get_by_role("button", name="Resume").click()
    await wait_until(lambda: any("/v1/workers" in url for url in asked), "the page asks again")


async def test_a_wrong_key_is_said_once(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    key, _ = await bus.api_keys.create("ops", ["admin"])
    async with (
        running_gateway(bus, model_folder, api_keys=True) as gateway,
        running_browser() as browser,
    ):
        tab = Tab(await browser.new_page(), gateway.url)
        await tab.page.goto(f"{gateway.url}/console")
        for _ in range(2):
            await tab.page.get_by_label("API key").fill("sk-lf-wrong")
            await tab.page.get_by_role("button", name="Sign in").click()
            await tab.page.get_by_role("alert").filter(has_text="is unknown").wait_for()
            assert (await tab.page.inner_text("body")).count("is unknown") == 1
        await tab.enter(key)
        await tab.go("Playground")
        await tab.page.get_by_label("Prompt", exact=True).fill("a secret draft")
        await tab.page.get_by_role("button", name="Sign out").click()
        await tab.page.get_by_label("API key").wait_for()
        left = await tab.page.evaluate("() => JSON.stringify([{...localStorage}, {...sessionStorage}])")
        assert left == "[{},{}]"


async def test_on_a_phone_states_are_seen_and_columns_are_announced(
    bus: Bus, fleet: ScriptedFleet, gateway: RunningGateway, http: httpx2.AsyncClient
) -> None:
    addresses = await populate(bus, fleet, http)
    cut = """() => [...document.querySelectorAll("main .scroll .tag")].filter((tag) => {
        const box = tag.closest(".scroll").getBoundingClientRect();
        const edge = tag.closest("td").getBoundingClientRect();
        const own = tag.getBoundingClientRect();
        return own.right > box.right || own.right > edge.right + 0.5 || tag.scrollWidth > tag.clientWidth + 1;
    }).map((tag) => tag.textContent)"""
    clipped = """() => [...document.querySelectorAll("h1, h2, .brand, nav a")].filter((one) =>
        one.offsetParent && (one.scrollWidth > one.clientWidth + 1 || one.getBoundingClientRect().right > innerWidth)
    ).map((one) => one.textContent)"""
    async with running_browser() as browser:
        tab = Tab(await browser.new_page(viewport=PHONE), gateway.url)
        await tab.enter()
        await tab.page.locator(".cue").first.wait_for()
        assert await tab.page.evaluate(cut) == []
        for title, address in addresses.items():
            await tab.go(title)
            await tab.page.locator("tbody tr").first.wait_for()
            assert await tab.page.evaluate(cut) == [], title
            await tab.page.locator(".cue").wait_for()
            await tab.page.goto(f"{tab.url}/console/#/{address}")
            await tab.page.get_by_role("dialog").wait_for()
            assert await tab.page.evaluate(clipped) == [], title
            await tab.page.keyboard.press("Escape")
        assert tab.wrong == []


async def test_a_chat_is_seen_by_no_other_key_and_in_no_other_tab(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    made = [await bus.api_keys.create(name, ["admin"]) for name in ("ops", "others")]
    keys = [secret for secret, _ in made]
    kept = "() => JSON.stringify([{...localStorage}, {...sessionStorage}])"
    async with (
        running_gateway(bus, model_folder, api_keys=True) as gateway,
        running_browser() as browser,
    ):
        context = await browser.new_context(viewport=WIDE)
        one, two = [Tab(await context.new_page(), gateway.url) for _ in range(2)]
        for tab in (one, two):
            await tab.enter(keys[0])
            await tab.go("Playground")
            await tab.page.get_by_label("Prompt", exact=True).fill("a secret draft")
            await tab.go("Overview")
            await wait_until(lambda tab=tab: is_kept(tab, "a secret draft"), "the draft is kept in its tab")
            assert "a secret draft" not in await tab.page.evaluate("() => JSON.stringify({...localStorage})")
        await one.page.get_by_role("button", name="Sign out").click()
        await one.page.get_by_label("API key").wait_for()
        await two.go("Playground")
        await two.page.get_by_label("Prompt", exact=True).fill("a second draft")
        await wait_until(lambda: is_kept(two, "a second draft"), "the other tab goes on")
        assert await one.page.evaluate(kept) == "[{},{}]"
        # The key is revoked, and another tenant signs in with the form that appears.
        await bus.api_keys.revoke(made[0][1].id)
        await two.page.get_by_role("link", name="Overview", exact=True).click()
        await two.page.get_by_label("API key").wait_for()
        await two.page.get_by_label("API key").fill(keys[1])
        await two.page.get_by_role("button", name="Sign in").click()
        await two.page.get_by_role("heading", name="Overview").wait_for()
        assert "draft" not in await two.page.evaluate(kept)
        assert [tab.wrong for tab in (one, two)] == [[], []]


async def is_kept(tab: Tab, text: str) -> bool:
    return text in await tab.page.evaluate("() => JSON.stringify({...sessionStorage})")


GOOD = {
    "id": "good", "changed_ms": 1, "mode": "chat", "models": ["base"], "values": {"max_tokens": 9}, "system": "",
    "tools": "", "draft": "kept draft", "turns": {"base": [{"role": "user", "content": "said before"}]},
}  # fmt: skip


WRONG = [
    "no JSON", "7", '"text"', "{}", "[null]", "[7]", '[{"id":"a"}]',
    *(json.dumps([{**GOOD, **wrong}]) for wrong in (
        {"turns": None}, {"turns": {"base": 7}}, {"turns": {"base": [None]}}, {"models": "base"}, {"values": None},
        {"turns": {"base": [{"role": "user", "content": 7}]}}, {"id": 7}, {"draft": None}, {"tools": {}},
        {"turns": {"base": [{"role": "assistant", "content": "x", "tool_calls": 7}]}},
        {"turns": {"base": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}},
    )),
]  # fmt: skip


async def test_chats_that_cannot_be_read_are_left_out(fleet: ScriptedFleet, tab: Tab) -> None:
    await tab.enter()
    for raw in WRONG:
        for name in ("sessionStorage", "localStorage"):
            await tab.page.evaluate(f"(raw) => {name}.setItem('lorafleet.chats', raw)", raw)
        await tab.page.goto(f"{tab.url}/console/#/playground/good")
        await tab.page.reload()
        await tab.page.get_by_text("This tab has no chat").wait_for()
        assert tab.wrong == [], raw
    assert await tab.page.evaluate("() => localStorage.length") == 0, "where earlier releases kept chats"


async def test_a_chat_of_the_right_shape_is_read(fleet: ScriptedFleet, tab: Tab) -> None:
    await tab.enter()
    await tab.page.evaluate("(raw) => sessionStorage.setItem('lorafleet.chats', raw)", json.dumps([None, GOOD]))
    await tab.page.goto(f"{tab.url}/console/#/playground/good")
    await tab.page.reload()
    await tab.page.locator(".turn.user", has_text="said before").wait_for()
    assert await tab.page.get_by_label("Prompt", exact=True).input_value() == "kept draft"
