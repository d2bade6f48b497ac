"""`/docs` in a real Chromium lists the operations and loads nothing from other hosts."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from helpers.browser import REASON, WIDE, Tab, running_browser
from helpers.scripted_fleet import RunningGateway

pytest.importorskip("playwright.async_api", reason=REASON)


async def test_the_api_is_shown_without_another_host(gateway: RunningGateway) -> None:
    asked: list[str] = []
    async with running_browser() as browser:
        page = await browser.new_page(viewport=WIDE)
        tab = Tab(page, gateway.url)
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(f"{gateway.url}/docs/")
        chat = page.locator(".opblock", has_text="/v1/chat/completions")
        await chat.first.wait_for()
        paths = await page.locator(".opblock-summary-path").all_inner_texts()
        await chat.first.click()
        await page.locator(".opblock-body").first.wait_for()
    assert len(paths) > 80
    assert tab.wrong == []
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(gateway.url).netloc}
