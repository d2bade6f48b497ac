"""A gateway without API keys answers programs on this machine, but no web pages of other sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.scripted_fleet import ScriptedFleet, gateway_client, running_gateway
from openai import AsyncOpenAI
from starlette.responses import PlainTextResponse

from gateway.app.shapes import shape_of
from gateway.auth.browsers import Browsers
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings

CHROME = {"user-agent": "Mozilla/5.0 (X11; Linux x86_64)"}
EVIL = "http://evil.example"


async def status(
    host: str = "localhost:8000", method: str = "POST", path: str = "/v1/models", *, sent: dict[str, str] | None = None,
    host_setting: str = "127.0.0.1", **settings: Any,
) -> int:  # fmt: skip
    app = Browsers(PlainTextResponse("ok"), Settings(host=host_setting, **settings), shape_of)  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://x") as http:
        answer = await http.request(method, path, headers={"host": host, **(sent or {})})
    if answer.status_code != 200:
        assert answer.json()["error"]
    return answer.status_code


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "127.0.0.2", "app.localhost:8000",
     "0.0.0.0:8000", "localhost.:8000"],
)  # fmt: skip
async def test_this_machine_s_names_are_answered_on_loopback(host: str) -> None:
    assert await status(host) == 200
    assert await status(host, sent=CHROME) == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io"])
async def test_other_names_are_refused_on_loopback(host: str) -> None:
    for sent in ({}, CHROME):
        assert await status(host, sent=sent) == 403
        assert await status(host, "GET", sent=sent) == 403
    assert await status(host, allowed_hosts=f"a.example, {host.partition(':')[0]}") == 200
    assert await status(host, allowed_hosts="*") == 200


@pytest.mark.parametrize("host", ["gateway:8000", "10.0.0.7:8000", "box.local:8000", "gw.ns.svc.cluster.local"])
async def test_names_of_a_private_network_are_answered_elsewhere(host: str) -> None:
    """As between containers, where the gateway listens on all addresses."""
    for sent in ({}, CHROME):
        assert await status(host, sent=sent, host_setting="0.0.0.0") == 200


async def test_a_public_name_is_answered_to_programs_and_not_to_pages() -> None:
    assert await status("llm.example.com", host_setting="0.0.0.0") == 200
    assert await status("llm.example.com", host_setting="0.0.0.0", sent=CHROME) == 403
    for allowed in ("llm.example.com", "a.example,LLM.example.com:8443"):
        assert await status("llm.example.com", host_setting="0.0.0.0", sent=CHROME, allowed_hosts=allowed) == 200
    # A page in Firefox can set another User-Agent, and its GET requests then look like those of a program.
    assert await status("evil.example.com", host_setting="0.0.0.0", allowed_hosts="llm.example.com") == 403
    assert await status("gateway", host_setting="0.0.0.0", allowed_hosts="llm.example.com") == 200


@pytest.mark.parametrize("host_setting", ["127.0.0.1", "0.0.0.0"])
async def test_pages_of_other_sites_are_refused(host_setting: str) -> None:
    for origin in (EVIL, "null", "http://localhost:3000", "https://localhost:8000.evil.example", "http://[::1"):
        sent = {"origin": origin, **CHROME}
        assert await status(sent=sent, host_setting=host_setting) == 403
        assert await status(sent=sent, host_setting=host_setting, cors_origins=f"{origin},http://b.example") == 200
        assert await status(sent=sent, host_setting=host_setting, cors_origins="*") == 200
    assert await status(sent={"origin": "http://localhost:8000", **CHROME}, host_setting=host_setting) == 200


async def test_a_page_that_hides_its_origin_is_refused_and_a_link_is_not() -> None:
    foreign = {"sec-fetch-site": "cross-site"}
    assert await status(sent=foreign) == 403
    assert await status(method="GET", sent={**foreign, "sec-fetch-mode": "no-cors"}) == 403
    assert await status(method="GET", sent={**foreign, "sec-fetch-mode": "navigate"}) == 200
    assert await status(sent={"sec-fetch-site": "same-origin"}) == 200
    assert await status(sent={"sec-fetch-site": "none"}) == 200


async def test_refusals_have_the_path_s_shape() -> None:
    app = Browsers(PlainTextResponse("ok"), Settings(), shape_of)  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://x") as http:
        answer = await http.post("/generate", headers={"host": "evil.example"})
        assert set(answer.json()) == {"error", "error_type"}
        answer = await http.post("/v1/models", headers={"host": "evil.example"})
        assert answer.json()["error"]["code"] == "unknown_host"


async def test_a_page_cannot_use_a_gateway_without_keys_and_programs_can(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    async with (
        running_gateway(bus, model_folder) as gateway,
        gateway.client() as http,
        AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client,
    ):
        body = {"model": "base", "prompt": "hi"}
        answer = await http.post("/v1/completions", json=body, headers={"origin": EVIL})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
        long = "a." * 300 + "localhost"  # longer than a name may be: it is not taken apart
        answer = await http.get("/v1/models", headers={"host": long, "origin": f"http://{long}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
        assert fleet.seen == []
        assert (await client.completions.create(model="base", prompt="hi")).choices
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
    async with gateway_client(bus, model_folder, cors_origins=EVIL) as http:
        answer = await http.post("/v1/completions", json=body, headers={"origin": EVIL})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == EVIL


async def test_with_keys_names_and_origins_are_of_no_interest(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    async with gateway_client(bus, model_folder, api_keys=True) as http:
        answer = await http.get("/health", headers={"host": "llm.example.com", "origin": EVIL})
        assert answer.status_code == 200
