"""Several bases in the console: each with its state, workers, requests and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.browser import REASON, WIDE, Tab, axe, running_browser
from helpers.reported import report
from helpers.scripted_fleet import make_model_folder, running_gateway

from protocol.queue.bus import Bus
from protocol.wire import messages as m

pytest.importorskip("playwright.async_api", reason=REASON)


def base(name: str) -> m.ServedModel:
    return m.ServedModel(
        model=name, name=name, fingerprint="f", model_type="t", vocab_size=300, max_model_len=256, sites=[]
    )


async def add_worker(bus: Bus, wid: str, of: str) -> None:
    beat = m.WorkerBeat(wid=wid, name=f"worker-{wid}", base=of, capacity=4)
    await bus.members.beat(bus.keys.worker_beat(wid), bus.keys.workers, wid, m.encode(beat), 60_000)


async def add_adapter(bus: Bus, name: str, of: str) -> None:
    alias = m.Alias(name=name, state="on_disk", digest=f"{name:0<64}", source=f"local:{name}", base=of, created_ms=1)
    record = m.AdapterRecord(
        digest=alias.digest, rank=8, num_bytes=1, config={}, modules=[], source=alias.source, created_ms=1
    )
    await bus.adapters.publish([(alias, record)])


@pytest.mark.parametrize("several", [True, False])
async def test_bases_are_shown_with_what_is_theirs(bus: Bus, tmp_path: Path, several: bool) -> None:
    folders = {name: make_model_folder(tmp_path / name) for name in ("chat", "embed", "bad")}
    further = ",".join(str(folders[name]) for name in ("embed", "bad")) if several else ""
    await report(bus, base("chat"))
    await add_worker(bus, "w1", "chat")
    for name, of in (("one", "chat"), ("two", "embed"), ("three", "embed")):
        await add_adapter(bus, name, of if several else "")
    if several:
        await bus._redis.hset(bus.keys.bases, "embed", m.encode(base("embed")))
        await add_worker(bus, "w2", "embed")
        await bus.members.note_failure("bad", "no memory")
        loads = {"chat": m.BaseLoad(1, 3, 2), "embed": m.BaseLoad(0, 7, 0)}
        status = m.SchedulerStatus(queued=10, running=2, workers=1, drain_rate=0.0, bases=loads)
        await bus.set(bus.keys.status, status, 60_000)
    async with running_gateway(bus, folders["chat"], more_models=further) as gateway, running_browser() as browser:
        tab = Tab(await (await browser.new_context(viewport=WIDE, bypass_csp=True)).new_page(), gateway.url)
        await tab.enter()
        workers = tab.page.get_by_role("region", name="Workers").get_by_role("row")
        await workers.filter(has_text="worker-w1").wait_for()
        if not several:
            assert await tab.page.get_by_role("heading", name="Bases").count() == 0
            assert "Base" not in await workers.first.inner_text()
            await tab.go("Adapters")
            await tab.page.get_by_text("3 of 3 adapters").wait_for()
            assert await tab.page.get_by_role("combobox", name="Base").count() == 0
            return
        assert "embed" in await workers.filter(has_text="worker-w2").inner_text()
        rows = tab.page.get_by_role("region", name="Bases").get_by_role("row")
        shown = [(await row.inner_text()).split() for row in await rows.all()]
        assert [row[:-2] for row in shown[1:]] == [
            ["chat", "ready", "generate", "1", "2", "3"],
            ["embed", "no", "worker", "generate", "0", "0", "7"],
            ["bad", "failed", "no", "memory", "–", "0", "0", "0"],
        ]
        await tab.page.evaluate(axe())
        assert await tab.violations() == []
        await rows.filter(has_text="embed").get_by_role("link").click()
        await tab.page.get_by_text("2 of 3 adapters").wait_for()
        assert tab.page.url.endswith("#/adapters?base=embed")
        await tab.page.get_by_role("combobox", name="Base").select_option("chat")
        await tab.page.get_by_text("1 of 3 adapters").wait_for()
        await tab.page.get_by_role("link", name="one").wait_for()
        assert await tab.violations() == []
        assert tab.wrong == []
