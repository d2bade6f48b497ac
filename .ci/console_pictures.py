"""Take the pictures of docs/console.md from a running fleet, which it keeps under load.

    KEY=sk-lf-… python .ci/console_pictures.py http://127.0.0.1:8000 docs/images

Start the fleet with `lorafleet up MODEL --adapters examples/adapters --api-keys --console-keys`; KEY needs the scope
`admin`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.browser import PHONE, WIDE, Tab, running_browser

BUSY_S = 300
"""Seconds of load before the first picture, so that charts have data to show."""

PROMPTS = (
    "Who are you?", "Describe the sea.", "What is a good breakfast?", "Tell me about the moon.", "Why is the sky blue?",
    "What do cats dream of?", "How do I get to the harbour?", "What is the best season?",
)  # fmt: skip
MODELS = ("pirate", "haiku", "json", "base")
TENANTS = ("acme", "globex", "initech")


PICTURES = {
    ("wide", "light"): {"overview", "requests", "request", "adapter", "batches", "usage", "keys", "playground"},
    ("wide", "dark"): {"overview", "playground"},
    ("phone", "light"): {"overview", "playground"},
    ("phone", "dark"): {"overview", "requests"},
}
"""(size, color scheme) -> pictures to take."""


class Load:
    """Clients of three tenants at varying rates."""

    def __init__(self, url: str, keys: list[str]) -> None:
        self._url = url
        self._keys = keys
        self._random = random.Random(7)

    async def run(self) -> None:
        """Send requests until cancelled."""
        async with httpx2.AsyncClient(base_url=self._url, timeout=120) as http, asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(self._client(http, number))

    async def _client(self, http: httpx2.AsyncClient, number: int) -> None:
        while True:
            key = self._keys[number % len(self._keys)]
            body = {
                "model": self._random.choice(MODELS if self._random.random() < 0.97 else ("unknown",)),
                "messages": [{"role": "user", "content": self._random.choice(PROMPTS)}],
                "max_tokens": self._random.randint(16, 64), "temperature": 0.7,
            }  # fmt: skip
            await http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            await asyncio.sleep(self._random.expovariate(0.2 + (number % 4) * 0.3))


async def prepare(http: httpx2.AsyncClient) -> list[str]:
    """Create tenants with limits, jobs and a batch; return a key for each tenant."""
    keys: list[str] = []
    for tenant in TENANTS:
        made = await http.post("/v1/keys", json={"tenant": tenant, "scopes": ["infer"], "note": f"{tenant}'s website"})
        keys.append(made.raise_for_status().json()["secret"])
    for tenant, limit in zip(TENANTS, (600, 120, 0), strict=True):
        (await http.post(f"/v1/tenants/{tenant}", json={"requests_per_minute": limit})).raise_for_status()
    lines = [
        {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 48}}
        for number, (model, prompt) in enumerate((model, prompt) for model in MODELS for prompt in PROMPTS)
    ]  # fmt: skip
    raw = "\n".join(json.dumps(line) for line in lines).encode()
    file = (await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("questions.jsonl", raw)})).json()
    wanted = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    (await http.post("/v1/batches", json=wanted)).raise_for_status()
    return keys


async def chat(page: Any) -> None:
    """Send one question to three adapters."""
    await page.goto(page.url.partition("#")[0] + "#/playground?model=pirate,haiku,json&prompt=Who+are+you%3F")
    await page.get_by_role("button", name="Remove json").wait_for()
    if not await page.get_by_label("Max tokens").is_visible():  # the form is folded on phones
        await page.get_by_text("Parameters", exact=True).click()
    await page.get_by_label("Max tokens").fill("60")
    await page.get_by_label("Temperature").fill("0")
    await page.get_by_role("button", name="Send", exact=True).click()
    await page.get_by_role("button", name="Stop").wait_for()
    await page.get_by_role("button", name="Send", exact=True).wait_for(timeout=60_000)


async def take(browser: Any, url: str, key: str, folder: Path, look: tuple[str, str]) -> None:
    """Take the pictures of one size and color scheme."""
    size, scheme = look
    wanted = PICTURES[look]
    end = ("-phone" if size == "phone" else "") + ("-dark" if scheme == "dark" else "")
    context = await browser.new_context(viewport=WIDE if size == "wide" else PHONE, color_scheme=scheme)
    tab = Tab(await context.new_page(), url)
    page = tab.page
    await tab.enter(key)

    async def shot(name: str, *, whole: bool = False) -> None:
        if name not in wanted:
            return
        await page.locator("text=Loading…").first.wait_for(state="detached")
        await page.screenshot(path=folder / f"console-{name}{end}.png", full_page=whole)

    await page.locator(".plot canvas").nth(5).wait_for()
    await page.locator(".facts").get_by_text("tokens/s").wait_for()
    await shot("overview", whole=size == "wide")
    await tab.go("Requests")
    await page.locator("tbody a.code").first.wait_for()
    await shot("requests")
    if size == "wide":
        await page.get_by_role("row").filter(has_text="completed").locator("a.code").first.click()
        await page.get_by_role("heading", name="Timeline").wait_for()
        await page.get_by_text("done on").first.wait_for()
        await shot("request")
        await page.keyboard.press("Escape")
        await page.goto(f"{url}/console/#/adapters/pirate")
        await page.get_by_role("dialog").get_by_text("By worker").wait_for()
        await shot("adapter")
        await page.keyboard.press("Escape")
        for title in ("Batches", "Usage", "Tenants and keys"):
            await tab.go(title)
            await page.locator("tbody tr, .plot canvas").first.wait_for()
            await shot(title.split()[-1].lower())
    await chat(page)
    await shot("playground", whole=size == "wide")
    await context.close()


async def main(url: str, folder: Path, key: str) -> None:
    """Keep the fleet under load, and take all pictures."""
    async with httpx2.AsyncClient(base_url=url, timeout=60, headers={"authorization": f"Bearer {key}"}) as http:
        load = asyncio.create_task(Load(url, await prepare(http)).run())
        await asyncio.sleep(BUSY_S)
        async with running_browser() as browser:
            for look in PICTURES:
                await take(browser, url, key, folder, look)
        load.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), os.environ["KEY"]))
