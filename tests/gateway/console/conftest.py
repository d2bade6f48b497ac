"""A browser tab with the console of a scripted fleet, without API keys."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from helpers.browser import REASON, WIDE, Tab, running_browser
from helpers.scripted_fleet import RunningGateway


@pytest_asyncio.fixture
async def tab(gateway: RunningGateway) -> AsyncIterator[Tab]:
    pytest.importorskip("playwright.async_api", reason=REASON)
    async with running_browser() as browser:
        context = await browser.new_context(viewport=WIDE, timezone_id="America/New_York")
        await context.grant_permissions(["clipboard-read", "clipboard-write"], origin=gateway.url)
        tab = Tab(await context.new_page(), gateway.url)
        tab.page.set_default_timeout(15_000)  # shorter than a test's timeout, so that the error names the element
        yield tab
        assert tab.wrong == []
