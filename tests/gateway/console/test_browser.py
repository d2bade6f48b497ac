"""Each page and action of the console in a real Chromium, with a real fleet of two workers, one of which is killed."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from helpers.browser import PHONE, REASON, WIDE, Tab, axe, running_browser
from helpers.script_queue import make_body, make_submit
from helpers.waiting import wait_until

from protocol.queue.bus import now_ms
from protocol.wire import messages as m
from protocol.wire.errors import WorkerLost

if TYPE_CHECKING:
    from helpers.console_fleet import ConsoleFleet

pytest.importorskip("playwright.async_api", reason=REASON)
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

PAGES = (
    "Overview", "Adapters", "Requests", "Jobs", "Batches", "Dead letters", "Usage", "Tenants and keys", "Playground",
)  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ConsoleFleet]:
    from helpers.console_fleet import console_fleet  # torch and transformers, which the skipped tests don't need

    async with console_fleet(tmp_path_factory.mktemp("console")) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    async with running_browser() as browser:
        yield browser


async def opened(browser: Any, fleet: ConsoleFleet, viewport: Any = WIDE, scheme: str = "light") -> Tab:
    context = await browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=False)
    tab = Tab(await context.new_page(), fleet.processes.url)
    await tab.enter(fleet.key)
    return tab


@pytest_asyncio.fixture(loop_scope="module")
async def tab(fleet: ConsoleFleet, browser: Any) -> AsyncIterator[Tab]:
    tab = await opened(browser, fleet)
    yield tab
    await tab.page.context.close()
    assert tab.wrong == []


def zipped(folder: Path) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for path in folder.iterdir():
            archive.writestr(f"{folder.name}/{path.name}", path.read_bytes())
    return raw.getvalue()


# ---------------------------------------------------------------- signing in, and the overview


async def test_only_an_operator_s_key_signs_in(fleet: ConsoleFleet, browser: Any) -> None:
    page = await browser.new_page()
    await page.goto(f"{fleet.processes.url}/console")
    theirs, _ = await fleet.processes.bus.api_keys.create("acme", ["infer"])
    for key, why in (("sk-lf-wrong", "is unknown"), (theirs, "needs a key with the scope admin")):
        await page.get_by_label("API key").fill(key)
        await page.get_by_role("button", name="Sign in").click()
        await page.get_by_role("alert").filter(has_text=why).wait_for()
    assert await page.evaluate("() => sessionStorage.length + localStorage.length + document.cookie.length") == 0
    await page.get_by_label("API key").fill(fleet.key)
    await page.keyboard.press("Enter")
    await page.get_by_role("heading", name="Overview").wait_for()
    await page.get_by_role("button", name="Sign out").click()
    await page.get_by_label("API key").wait_for()
    assert await page.evaluate("() => sessionStorage.length") == 0
    await page.close()


async def test_workers_are_drained_resumed_and_watched_as_one_is_killed(fleet: ConsoleFleet, tab: Tab) -> None:
    row = tab.page.get_by_role("row").filter(has=tab.page.get_by_role("rowheader", name="two"))
    await row.get_by_text("ready").wait_for()
    await tab.page.get_by_role("button", name="Drain two").click()
    await tab.page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    await tab.said("two is draining.")
    await row.get_by_text("draining").wait_for()
    await tab.page.get_by_role("button", name="Resume two").click()
    await tab.said("two accepts requests again.")
    await row.get_by_text("ready").wait_for()
    rid = await fleet.long()
    rate = tab.page.locator(".facts div").filter(has_text="Throughput").get_by_role("definition")
    await rate.filter(has_text=re.compile("^[1-9]")).wait_for()
    fleet.processes.kill("two")
    await row.wait_for(state="detached")
    fleet.processes.start("worker", "two")
    await row.get_by_text("ready").wait_for(timeout=90_000)
    for number in range(8):
        await fleet.http.post(f"/v1/requests/{rid[:-1]}{number}/cancel")


# ---------------------------------------------------------------- adapters


async def test_adapters_are_found_and_ordered_about(fleet: ConsoleFleet, tab: Tab) -> None:
    await fleet.ask("alpha")
    await tab.go("Adapters")
    await tab.page.get_by_role("row").filter(has_text="broken").get_by_text("failed").wait_for()
    await tab.page.get_by_role("searchbox").fill("GAM")
    await tab.page.get_by_text("1 of 4 adapters").wait_for()
    await tab.page.get_by_role("searchbox").fill("")
    await tab.page.get_by_role("link", name="broken").click()
    dialog = tab.page.get_by_role("dialog")
    await dialog.get_by_text("refused: not served").wait_for()
    await dialog.locator(".problem").wait_for()
    await dialog.get_by_role("button", name="Close").click()
    await tab.page.get_by_role("link", name="alpha").click()
    await dialog.get_by_role("button", name="Pin", exact=True).click()
    await tab.said("Pinned on all workers.")
    await dialog.get_by_role("button", name="Unpin").click()
    await tab.said("Unpinned.")
    await dialog.get_by_role("button", name="Preload").click()
    await tab.said("Workers are loading it.")
    await dialog.get_by_role("cell", name="resident").first.wait_for()
    await dialog.get_by_role("button", name="Evict").click()
    await tab.said("Freed")
    await dialog.get_by_role("button", name="Refresh").click()
    await tab.said("is a folder under the adapter root")


async def test_a_folder_and_a_zip_are_uploaded(fleet: ConsoleFleet, tab: Tab, tmp_path: Path) -> None:
    made = fleet.adapter(tmp_path / "mine", 9)
    await tab.go("Adapters")
    dialog = tab.page.get_by_role("dialog")
    await tab.page.get_by_role("button", name="Add…").click()
    await dialog.get_by_label("files or a zip").set_input_files([str(path) for path in made.iterdir()])
    await dialog.get_by_label("Name", exact=True).fill("mine")
    await dialog.get_by_role("button", name="Upload", exact=True).click()
    await tab.said("mine is served.")
    await dialog.wait_for(state="detached")
    first = (await fleet.http.get("/v1/adapters/mine")).json()
    assert first["source"].startswith("local:uploads/kept/")
    assert (await fleet.ask("mine"))["choices"]
    # Replaced by dropping a zip, after an attempt without permission to replace.
    await tab.page.get_by_role("button", name="Add…").click()
    raw = list(zipped(fleet.adapter(tmp_path / "other", 10)))
    await dialog.locator("[data-drop]").evaluate(
        """(box, bytes) => {
            const given = new DataTransfer();
            given.items.add(new File([new Uint8Array(bytes)], "other.zip"));
            box.dispatchEvent(new DragEvent("drop", {dataTransfer: given, bubbles: true, cancelable: true}));
        }""",
        raw,
    )
    await dialog.get_by_text("1 file,").wait_for()
    await dialog.get_by_label("Name", exact=True).fill("mine")
    await dialog.get_by_role("button", name="Upload", exact=True).click()
    await dialog.get_by_role("alert").filter(has_text="use replace").wait_for()
    await dialog.get_by_label("replace an existing adapter").check()
    await dialog.get_by_role("button", name="Upload", exact=True).click()
    await tab.said("mine is served.")
    await dialog.wait_for(state="detached")
    assert (await fleet.http.get("/v1/adapters/mine")).json()["digest"] != first["digest"]
    # Refused, with the reasons.
    await tab.page.get_by_role("button", name="Add…").click()
    wrong = {"name": "adapter_config.json", "mimeType": "application/json", "buffer": b'{"peft_type": "IA3"}'}
    weights = {"name": "adapter_model.safetensors", "mimeType": "", "buffer": bytes(8) + b"{}"}
    await dialog.get_by_label("files or a zip").set_input_files([wrong, weights])
    await dialog.get_by_label("Name", exact=True).fill("wrong")
    await dialog.get_by_role("button", name="Upload", exact=True).click()
    await dialog.get_by_role("alert").wait_for()
    await dialog.get_by_role("button", name="Close").click()
    await tab.page.get_by_role("link", name="mine").click()
    await dialog.get_by_role("button", name="Unload…").click()
    await tab.page.get_by_role("dialog").last.get_by_role("button", name="Unload", exact=True).click()
    await tab.said("mine was unloaded.")
    assert (await fleet.http.get("/v1/adapters/mine")).status_code == 404


async def test_a_place_is_registered(fleet: ConsoleFleet, tab: Tab) -> None:
    await tab.go("Adapters")
    dialog = tab.page.get_by_role("dialog")
    await tab.page.get_by_role("button", name="Add…").click()
    await dialog.get_by_role("button", name="Hub / S3 / local path").click()
    await dialog.get_by_label("Name", exact=True).fill("again")
    await dialog.get_by_label("Source (default").fill("local:beta")
    await dialog.get_by_role("button", name="Register").click()
    await tab.said("again: ")
    await tab.page.get_by_role("link", name="again", exact=True).click()
    await dialog.get_by_role("button", name="Refresh").click()
    await tab.said("Checked its source for changes.")
    await fleet.http.delete("/v1/adapters/again")


# ---------------------------------------------------------------- requests, dead letters


async def test_a_request_is_followed_and_cancelled(fleet: ConsoleFleet, tab: Tab) -> None:
    rid = await fleet.long()
    for worker in ("one", "two"):  # so that it does not end before it is cancelled
        fleet.processes.signal(worker, signal.SIGSTOP)
    try:
        await tab.go("Requests")
        await tab.page.get_by_role("link", name=rid).click()
        dialog = tab.page.get_by_role("dialog").first
        await dialog.get_by_text("queued, ").wait_for()
        await dialog.get_by_role("button", name="Cancel…").click()
        await tab.page.get_by_role("dialog").last.get_by_role("button", name="Cancel the request").click()
        await tab.said("Cancellation was requested.")
    finally:
        for worker in ("one", "two"):
            fleet.processes.signal(worker, signal.SIGCONT)
    await dialog.get_by_text("cancelled").first.wait_for()
    await dialog.get_by_role("button", name="Close").click()
    await tab.go("Jobs")
    job = f"job_{rid.removesuffix('-0')}"
    await tab.page.get_by_role("link", name=job).click()
    await dialog.get_by_text("/v1/completions").wait_for()
    assert tab.page.url.endswith(f"#/jobs/{job}")
    await dialog.get_by_role("button", name="Close").click()
    await fleet.http.post(f"/v1/requests/{rid.removesuffix('-0')}/cancel")


async def test_a_dead_letter_is_queued_again(fleet: ConsoleFleet, tab: Tab) -> None:
    bus = fleet.processes.bus
    for number in range(20):  # a worker may answer it before it becomes a dead letter
        rid = f"given-up-{number}"
        sub = make_submit(rid, cls="batch", gateway="", stored=True)
        await bus.submit("batch", [(sub, make_body())], max_queued=100)
        letter = m.DeadLetter(reason="three workers died", submit=sub, ms=now_ms())
        if await bus.finish(rid, "failed", "error", WorkerLost("poison"), dead_letter=letter):
            break
    else:
        pytest.fail("all twenty were answered before they could be given up")
    await tab.go("Dead letters")
    await tab.page.get_by_text("three workers died").wait_for()
    await tab.page.get_by_role("button", name="Retry").click()
    await tab.said(f"{rid} was requeued.")

    async def is_done() -> bool:
        facts = (await bus.requests([rid]))[0]
        return facts is not None and facts.state == "completed"

    await wait_until(is_done, "the request is answered")


async def test_a_batch_shows_its_progress(fleet: ConsoleFleet, tab: Tab) -> None:
    call = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "alpha", "prompt": "dog"}}
    files = {"file": ("calls.jsonl", json.dumps(call).encode())}
    file = (await fleet.http.post("/v1/files", data={"purpose": "batch"}, files=files)).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    assert (await fleet.http.post("/v1/batches", json=body)).status_code == 200
    await tab.go("Batches")
    await tab.page.get_by_text("1 of 1").wait_for(timeout=60_000)


# ---------------------------------------------------------------- keys, playground


async def test_a_key_is_made_limited_and_revoked(fleet: ConsoleFleet, tab: Tab) -> None:
    await tab.go("Tenants and keys")
    await tab.page.get_by_role("button", name="New key…").click()
    dialog = tab.page.get_by_role("dialog")
    await dialog.get_by_label("Tenant", exact=True).fill("globex")
    await dialog.get_by_label("Note").fill("from the console")
    await dialog.get_by_role("button", name="Create key").click()
    secret = await dialog.locator("[data-secret]").inner_text()
    await dialog.get_by_role("button", name="Close").click()
    theirs = {"authorization": f"Bearer {secret}"}
    assert (await fleet.http.get("/v1/models", headers=theirs)).status_code == 200
    await tab.page.get_by_role("button", name="Limit globex").click()
    await dialog.get_by_label("Requests per minute").fill("7")
    await dialog.get_by_role("button", name="Save").click()
    await tab.page.get_by_role("row").filter(has_text="globex").first.get_by_text("7", exact=True).wait_for()
    assert (await fleet.processes.bus.api_keys.tenant("globex")).requests_per_minute == 7
    row = tab.page.get_by_role("row").filter(has_text="from the console")
    await row.get_by_role("button").click()
    await tab.page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    await tab.said("was revoked.")
    await row.wait_for(state="detached")
    assert (await fleet.http.get("/v1/models", headers=theirs)).status_code == 401


async def test_prompts_are_answered_side_by_side_and_by_the_same_call(fleet: ConsoleFleet, tab: Tab) -> None:
    await tab.go("Playground")
    for name in ("alpha", "beta"):
        await tab.page.get_by_label("Model or adapter").fill(name)
        await tab.page.get_by_role("button", name="Add", exact=True).click()
    await tab.page.get_by_label("Endpoint").select_option("text")
    await tab.page.get_by_label("Max tokens").fill("12")
    await tab.page.get_by_label("Temperature").fill("0")
    await tab.page.get_by_role("textbox", name="Prompt", exact=True).fill("the dog's day")
    await tab.page.get_by_role("button", name="Send", exact=True).click()
    told: dict[str, str] = {}
    for name in ("alpha", "beta"):
        answer = tab.page.get_by_role("region", name=f"Answers of {name}")
        await answer.get_by_text("tokens/s").wait_for()
        told[name] = (await answer.locator(".turn.assistant").inner_text()).strip()
    assert told["alpha"] != told["beta"]
    words = shlex.split((await tab.page.locator("pre").inner_text()).replace("\\\n", " "))
    wanted = json.loads(words[words.index("-d") + 1])
    again = (await fleet.http.post(words[1], json=wanted)).json()
    assert again["choices"][0]["text"].strip() == told["alpha"]
    await tab.page.get_by_role("button", name="Python").click()
    program = await tab.page.locator("pre").inner_text()
    compile(program, "program", "exec")
    assert "client.completions.create(" in program


async def test_a_chat_goes_on(fleet: ConsoleFleet, tab: Tab) -> None:
    await tab.go("Playground")
    for turn in (1, 2):
        await tab.page.get_by_label("Max tokens").fill("8")
        await tab.page.get_by_role("textbox", name="Prompt", exact=True).fill(f"turn {turn}")
        await tab.page.get_by_role("button", name="Send", exact=True).click()
        refused = tab.page.get_by_role("alert")
        await tab.page.locator(".turn.user").nth(turn - 1).wait_for()
        await tab.page.get_by_role("button", name="Send", exact=True).wait_for()
        assert await refused.count() == 0, await refused.inner_text()


# ---------------------------------------------------------------- accessibility


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "phone"])
async def test_axe_finds_nothing_on_any_page(fleet: ConsoleFleet, browser: Any, scheme: str, size: str) -> None:
    script = axe()
    tab = await opened(browser, fleet, PHONE if size == "phone" else WIDE, scheme)
    await fleet.ask("alpha")
    wrong: dict[str, list[str]] = {}

    async def hold(name: str) -> None:
        await tab.page.evaluate(script)  # through the debugger, to which the page's policy does not apply
        if found := await tab.violations():
            wrong[name] = found

    for title in PAGES:
        await tab.go(title)
        await tab.page.get_by_text("Loading…").first.wait_for(state="detached")
        await hold(title)
    await tab.go("Adapters")
    await tab.page.get_by_role("link", name="broken").click()
    await tab.page.get_by_role("dialog").get_by_text("By worker").wait_for()
    await hold("an adapter")
    await tab.page.get_by_role("button", name="Close").click()
    await tab.page.get_by_role("button", name="Add…").click()
    await hold("upload")
    await tab.page.get_by_role("button", name="Hub / S3 / local path").click()
    await hold("a place")
    await tab.page.get_by_role("button", name="Close").click()
    await tab.go("Requests")
    await tab.page.locator("tbody a.code").first.click()
    await tab.page.get_by_role("heading", name="Timeline").wait_for()
    await hold("a request")
    await tab.page.get_by_role("button", name="Close").click()
    await tab.go("Batches")
    await tab.page.get_by_role("button", name="New batch…").click()
    await hold("a new batch")
    await tab.page.get_by_role("button", name="Close").click()
    await tab.go("Tenants and keys")
    await tab.page.get_by_role("button", name="New key…").click()
    await hold("a new key")
    assert wrong == {}
    assert tab.wrong == []
    await tab.page.context.close()


async def test_it_is_used_by_keyboard_alone(fleet: ConsoleFleet, tab: Tab) -> None:
    page = tab.page

    async def reach(name: str) -> None:
        for _ in range(40):
            await page.keyboard.press("Tab")
            focused = "() => document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
            if (await page.evaluate(focused)).strip() == name:
                return
        pytest.fail(f"{name} is not reached by Tab")

    await reach("Adapters")
    await page.keyboard.press("Enter")
    await page.get_by_role("link", name="alpha").wait_for()
    await reach("alpha")
    await page.keyboard.press("Enter")
    await page.get_by_role("dialog").get_by_text("By worker").wait_for()
    await page.keyboard.press("Escape")
    await page.get_by_role("dialog").wait_for(state="detached")
