"""A real Chromium for tests of the console, and the checks that every page must pass."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
TOO_WIDE = """() => {
    if (document.documentElement.scrollWidth <= innerWidth) return [];
    const all = [...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll"));
    const out = all.filter((one) => one.getBoundingClientRect().right > innerWidth + 1);
    return out.slice(0, 3).map((one) => `too wide: ${one.outerHTML.slice(0, 120)}`);
}"""
"""Returns the elements that make a page wider than its window, except in containers that scroll."""

REASON = "needs a browser: make test-console"


def chromium() -> str:
    """Return the path of the browser. Skips the test if there is none."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip(f"there is no chromium: apt-get install chromium; {REASON}")
    return found


def axe() -> str:
    """Return axe-core's script, which `.ci/console_assets.py` downloads. Skips the test if it is missing."""
    path = Path(os.environ.get("AXE", ".venv-console/axe/axe.min.js"))
    if not path.exists():
        pytest.skip(f"there is no axe-core at {path}: python .ci/console_assets.py {path.parent}; {REASON}")
    return path.read_text()


@asynccontextmanager
async def running_browser() -> AsyncIterator[Any]:
    """Run a browser."""
    api: Any = pytest.importorskip("playwright.async_api", reason=REASON)
    path = chromium()
    async with api.async_playwright() as play:
        browser = await play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        await browser.close()


class Tab:
    """A page of the console, and the errors in it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.url = url
        self.wrong: list[str] = []
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda line: self.wrong.append(line.text) if is_wrong(line) else None)

    async def enter(self, key: str = "") -> None:
        """Open the console, and enter a key if it asks for one."""
        await self.page.goto(f"{self.url}/console")
        if key:
            await self.page.get_by_label("API key").fill(key)
            await self.page.get_by_role("button", name="Sign in").click()
        await self.page.get_by_role("heading", name="Overview").wait_for()

    async def go(self, title: str) -> None:
        """Open a page by its link."""
        await self.page.get_by_role("link", name=title, exact=True).click()
        await self.page.get_by_role("heading", level=1, name=title).wait_for()

    async def said(self, text: str) -> None:
        """Wait until the page shows a message to the operator."""
        await self.page.locator(".said", has_text=text).last.wait_for()

    async def violations(self) -> list[str]:
        """Return axe's findings, and what makes the page wider than the window."""
        found = await self.page.evaluate("() => axe.run(document)")
        told = [
            f"{one['id']}: {one['help']}: {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
            for one in found["violations"]
            for node in one["nodes"][:3]
        ]
        return told + await self.page.evaluate(TOO_WIDE)


def is_wrong(line: Any) -> bool:
    """Return whether a line of the browser's log is an error. Failed loads are not: refused requests cause them too."""
    return line.type == "error" and "Failed to load resource" not in line.text
