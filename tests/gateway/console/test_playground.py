"""The playground sends what is typed, keeps chats, and shows the code of the calls it made."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import REASON, Tab, running_browser
from helpers.scripted_fleet import Script, ScriptedFleet, make_model_folder, running_gateway
from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from protocol.wire.errors import WorkerLost

pytest.importorskip("playwright.async_api", reason=REASON)

SQL = "d" * 64


async def start(tab: Tab) -> None:
    """Open the playground, with a limit on answers that fits the context of the scripted model."""
    await tab.enter()
    await tab.go("Playground")
    await tab.page.get_by_label("Max tokens").fill("60")


async def send(tab: Tab, prompt: str, key: str = "Enter") -> None:
    box = tab.page.get_by_label("Prompt", exact=True)
    await box.fill(prompt)
    await box.press(key)


async def answered(tab: Tab, number: int) -> None:
    """Wait until `number` answers of a chat have ended."""
    await wait_until(lambda: num_ended(tab, number), f"{number} answers have ended")


async def num_ended(tab: Tab, number: int) -> bool:
    return await tab.page.locator(".figures", has_text="stop").count() == number


async def body_of(tab: Tab) -> dict[str, Any]:
    """Return the body of the call that the page shows as curl command."""
    words = shlex.split((await tab.page.get_by_label("Code: curl").inner_text()).replace("\\\n", " "))
    return json.loads(words[words.index("-d") + 1])


async def test_a_typed_model_is_asked_whether_or_not_it_was_added(fleet: ScriptedFleet, tab: Tab) -> None:
    await fleet.add_adapter("sql", SQL)
    await start(tab)
    await tab.page.get_by_label("Model or adapter").fill("sql")
    await send(tab, "the dog")
    await tab.page.get_by_role("region", name="Answers of sql").get_by_text("Hello").wait_for()
    assert [submit.digest for submit, _ in fleet.seen] == [SQL]
    assert await tab.page.get_by_label("Prompt", exact=True).input_value() == ""
    assert await tab.page.get_by_role("region", name="Answers of tiny/base").count() == 0
    await tab.page.get_by_role("button", name="Remove sql").click()
    await tab.page.get_by_label("Model or adapter").fill("nope")
    await send(tab, "the dog")
    region = tab.page.get_by_role("region", name="Answers of nope")
    await region.get_by_role("alert").filter(has_text="nope").wait_for()
    await tab.page.get_by_text("(not in the catalogue)").wait_for()
    assert len(fleet.seen) == 1


async def test_a_failed_prompt_is_in_no_later_call(fleet: ScriptedFleet, tab: Tab) -> None:
    await start(tab)
    fleet.script = lambda submit, body: Script(error=WorkerLost("its worker died"))
    await send(tab, "first")
    await tab.page.get_by_role("alert").filter(has_text="its worker died").wait_for()
    assert [turn["content"] for turn in (await body_of(tab))["messages"]] == ["first"]  # the call that was made
    fleet.script = lambda submit, body: Script(text="fine")
    await send(tab, "second")
    await answered(tab, 1)
    assert "first" not in fleet.prompt()
    await send(tab, "third")
    await answered(tab, 2)
    made = [(turn["role"], turn["content"]) for turn in (await body_of(tab))["messages"]]
    assert made == [("user", "second"), ("assistant", "fine"), ("user", "third")]
    await tab.page.get_by_label("Prompt", exact=True).fill("fourth")
    wanted = [turn["content"] for turn in (await body_of(tab))["messages"]]
    assert wanted == ["second", "fine", "third", "fine", "fourth"]


async def test_what_failed_is_asked_again_by_retry(fleet: ScriptedFleet, tab: Tab) -> None:
    await start(tab)
    fleet.script = lambda submit, body: Script(error=WorkerLost("its worker died"))
    await send(tab, "once more")
    retry = tab.page.get_by_role("button", name="Retry")
    await retry.wait_for()
    fleet.script = lambda submit, body: Script(text="fine")
    await retry.click()
    await answered(tab, 1)
    assert fleet.prompt().count("once more") == 1
    assert await tab.page.locator(".turn.user").count() == 1
    assert await retry.count() == 0


async def test_keys_send_and_start_lines(fleet: ScriptedFleet, tab: Tab) -> None:
    await start(tab)
    box = tab.page.get_by_label("Prompt", exact=True)
    await box.fill("one")
    await box.press("Shift+Enter")
    await box.press_sequentially("line")
    assert await box.input_value() == "one\nline"
    assert fleet.seen == []
    for number, key in enumerate(("Enter", "Control+Enter", "Meta+Enter"), start=1):
        await send(tab, f"prompt {number}", key)
        await answered(tab, number)
        assert await box.input_value() == ""
    assert len(fleet.seen) == 3


async def test_chats_are_kept_while_other_pages_are_shown_and_after_a_reload(fleet: ScriptedFleet, tab: Tab) -> None:
    fleet.script = lambda submit, body: Script(text="one two three four", hold_after=3)
    await start(tab)
    await send(tab, "count")
    await tab.page.locator(".turn.assistant", has_text="o").wait_for()
    await tab.page.get_by_label("Prompt", exact=True).fill("a draft")
    await tab.go("Overview")
    fleet.go.set()
    await tab.go("Playground")
    await answered(tab, 1)
    address = tab.page.url
    assert "#/playground/" in address
    await tab.page.reload()
    await tab.page.locator(".turn.assistant", has_text="one two three four").wait_for()
    assert await tab.page.get_by_label("Prompt", exact=True).input_value() == "a draft"
    await tab.page.get_by_role("button", name="New chat").click()
    await tab.page.locator(".turn.assistant", has_text="one two three four").wait_for(state="detached")
    await tab.page.get_by_role("combobox", name="Chat").first.select_option(address.rpartition("/")[2])
    await tab.page.locator(".turn.assistant", has_text="one two three four").wait_for()
    await tab.page.get_by_role("button", name="Delete chat").click()
    await tab.said("The chat was deleted.")
    await tab.page.goto(address)
    await tab.page.get_by_text("This tab has no chat").wait_for()


async def test_a_link_opens_a_prompt_for_models(fleet: ScriptedFleet, tab: Tab) -> None:
    await fleet.add_adapter("sql", SQL)
    await tab.enter()
    await tab.page.goto(f"{tab.url}/console/#/playground?model=sql&prompt=the+dog%27s+day&endpoint=text")
    await tab.page.get_by_role("button", name="Remove sql").wait_for()
    assert await tab.page.get_by_label("Prompt", exact=True).input_value() == "the dog's day"
    assert await tab.page.get_by_label("Endpoint").input_value() == "text"
    await tab.page.get_by_label("Max tokens").fill("60")
    await tab.page.get_by_role("button", name="Send", exact=True).click()
    await answered(tab, 1)
    assert fleet.prompt() == "the dog's day"
    await tab.page.get_by_role("button", name="Copy", exact=True).click()
    assert await tab.page.evaluate("() => navigator.clipboard.readText()") == Script().text
    await tab.page.get_by_role("button", name="Copy link").click()
    link = await tab.page.evaluate("() => navigator.clipboard.readText()")
    assert "#/playground?" in link
    assert Script().text[:5] not in link
    await tab.page.goto(f"{tab.url}/console/#/adapters/sql")
    await tab.page.get_by_role("link", name="Try it").click()
    await tab.page.get_by_role("button", name="Remove sql").wait_for()


async def test_tools_are_called_and_their_results_sent(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    template = Path(__file__).parents[1] / "templates" / "qwen.jinja"
    folder = make_model_folder(tmp_path / "model", template.read_text())
    fleet.max_model_len = 2048
    await fleet.register()
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    fleet.script = lambda submit, body: Script(text=call)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "strict": True}}}]
    async with running_gateway(bus, folder) as gateway, running_browser() as browser:
        tab = Tab(await browser.new_page(), gateway.url)
        await start(tab)
        assert await tab.page.locator("input[type=file]").count() == 0, "no picture is offered that is not served"
        await tab.page.get_by_label("Tools").fill('{"not": "a list"}')
        await send(tab, "is it warm?")
        await tab.page.locator(".answers").get_by_role("alert").filter(has_text="expected a JSON array").wait_for()
        assert fleet.seen == []
        await tab.page.get_by_label("Tools").fill(json.dumps(tools))
        await send(tab, "is it warm in Paris?")
        await tab.page.get_by_label("Result of weather").fill("18 degrees")
        fleet.script = lambda submit, body: Script(text="Yes.")
        await tab.page.get_by_role("button", name="Send results").click()
        await tab.page.get_by_text("Yes.").wait_for()
        assert "18 degrees" in fleet.prompt()
        assert "weather" in fleet.prompt()
        roles = [turn["role"] for turn in (await body_of(tab))["messages"]]
        assert roles == ["user", "assistant", "tool"]
        await tab.page.get_by_role("button", name="Python").click()
        program = await tab.page.get_by_label("Code: Python").inner_text()
        compile(program, "program", "exec")
        assert '"strict": True' in program
        assert tab.wrong == []
