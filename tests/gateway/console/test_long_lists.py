"""The console with thousands of rows and with markup in names: all is displayed as text, and none is executed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from helpers.browser import REASON, Tab, running_browser
from helpers.script_queue import make_body, make_submit
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet
from helpers.waiting import wait_until

from gateway.calls import observe
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m

pytest.importorskip("playwright.async_api", reason=REASON)

MARKUP = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script>'


@pytest_asyncio.fixture
async def tab(gateway: RunningGateway) -> AsyncIterator[Tab]:
    async with running_browser() as browser:
        page = await browser.new_page(viewport={"width": 1280, "height": 800})
        tab = Tab(page, gateway.url)
        yield tab
        assert tab.wrong == []


async def num_rows(tab: Tab) -> int:
    return await tab.page.locator("tbody tr").count()


async def test_thousands_of_rows_are_listed_by_making_few(bus: Bus, fleet: ScriptedFleet, tab: Tab) -> None:
    fleet.assigning.clear()
    names = [(f"tenant-{number:04}/adapter", f"{number:064x}") for number in range(5000)]
    await bus.adapters.publish(
        (m.Alias(name=name, state="on_disk", digest=digest, source="local:x"), None) for name, digest in names
    )
    for begin in range(0, 1000, 100):
        pairs = [(make_submit(f"r{number:04}"), make_body()) for number in range(begin, begin + 100)]
        for pair in pairs:
            await bus.submit("interactive", [pair], max_queued=10_000)
    await tab.enter()
    await tab.go("Adapters")
    await tab.page.get_by_text("5,000 of 5,000 adapters").wait_for()
    assert await num_rows(tab) < 60
    region = tab.page.get_by_role("region", name="Adapters")
    await region.evaluate("box => box.scrollTo(0, box.scrollHeight)")
    await tab.page.get_by_role("link", name="tenant-4999/adapter").wait_for()
    assert await num_rows(tab) < 60
    await tab.page.get_by_role("searchbox").fill("tenant-3210")
    await tab.page.get_by_text("1 of 5,000 adapters").wait_for()
    await tab.page.get_by_role("link", name="tenant-3210/adapter").click()
    await tab.page.get_by_role("dialog").get_by_text("on the store's disk").wait_for()
    await tab.page.keyboard.press("Escape")
    await tab.go("Requests")
    await tab.page.get_by_text("1,000 requests").wait_for()
    assert await num_rows(tab) < 60
    region = tab.page.get_by_role("region", name="Requests")
    await region.evaluate("box => box.scrollTo(0, box.scrollHeight)")
    await tab.page.get_by_role("link", name="r0000").wait_for()
    assert await tab.page.locator("table").get_attribute("aria-rowcount") == "1001"


async def test_foreign_text_is_text_wherever_it_is_shown(bus: Bus, fleet: ScriptedFleet, tab: Tab) -> None:
    fleet.assigning.clear()
    alias = m.Alias(
        name=MARKUP, state="failed", source=f"hub:{MARKUP}", reason=f"refused: {MARKUP}", created_ms=1, status=422
    )
    await bus.adapters.publish([(alias, None)])
    await bus.submit("interactive", [(make_submit("r1", tenant=MARKUP), make_body())], max_queued=10)
    letter = m.DeadLetter(reason=MARKUP, stream=MARKUP, raw=MARKUP.encode(), ms=now_ms())
    await bus._redis.xadd(bus.keys.dlq, {"b": m.encode(letter)})
    await bus._redis.expire(bus.keys.dlq, 600)
    fleet.wid = MARKUP
    await fleet.register()

    async def shown() -> None:
        await tab.page.get_by_text("onerror").first.wait_for()
        assert await tab.page.locator("img, main script, dialog script").count() == 0
        assert not await tab.page.evaluate("() => window.hurt")

    observe.SERIES.count(MARKUP, MARKUP, "requests")
    await tab.enter()
    await tab.page.get_by_role("img", name="onerror").wait_for()  # a chart with that name in its legend
    await shown()
    await tab.go("Adapters")
    await shown()
    await tab.page.get_by_role("link", name="onerror").click()
    await tab.page.get_by_role("dialog").get_by_text("refused: <img").wait_for()
    await shown()
    await tab.page.keyboard.press("Escape")
    await tab.go("Requests")
    await shown()
    await tab.go("Dead letters")
    await shown()
    await tab.page.locator("tbody a.code").click()
    await tab.page.get_by_role("heading", name="Message").wait_for()
    await shown()


async def test_markup_in_an_answer_is_text(fleet: ScriptedFleet, tab: Tab) -> None:
    fleet.script = lambda submit, body: Script(text=MARKUP)
    await tab.enter()
    await tab.go("Playground")
    await tab.page.get_by_label("Max tokens").fill("120")
    await tab.page.get_by_label("Prompt", exact=True).fill(MARKUP)
    await tab.page.get_by_role("button", name="Send", exact=True).click()
    answers: Any = tab.page.locator(".turn.assistant", has_text="onerror")
    await answers.wait_for()
    assert await tab.page.locator("img, main script").count() == 0
    assert not await tab.page.evaluate("() => window.hurt")


async def test_a_stream_is_stopped(bus: Bus, fleet: ScriptedFleet, tab: Tab) -> None:
    fleet.script = lambda submit, body: Script(text="one two three four", hold_after=3)
    await tab.enter()
    await tab.go("Playground")
    await tab.page.get_by_label("Max tokens").fill("120")
    await tab.page.get_by_label("Prompt", exact=True).fill("count")
    await tab.page.get_by_role("button", name="Send", exact=True).click()
    await tab.page.locator(".turn.assistant", has_text="o").wait_for()
    await tab.page.get_by_role("button", name="Stop").click()
    await tab.page.get_by_role("button", name="Send", exact=True).wait_for()
    rid = fleet.seen[-1][0].rid

    async def is_cancelled() -> bool:
        return (await bus._redis.hget(bus.keys.req(rid), "cancel")) == b"1"

    await wait_until(is_cancelled, "the request is asked to end")
    fleet.go.set()
