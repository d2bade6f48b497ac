"""The console's files need no key and contain no data; its policy keeps browsers from running or loading others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.scripted_fleet import RunningGateway, ScriptedFleet, gateway_client

from gateway.console.console_routes import DOCS_FOLDER, DOCS_POLICY, FOLDER, HEADERS, KINDS, POLICY, load
from protocol.queue.bus import Bus

OWN = sorted(path for path in FOLDER.glob("*.js"))


async def test_the_console_is_served_without_a_key(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    async with gateway_client(bus, model_folder, api_keys=True, path_prefix="/lora/fleet") as http:
        for prefix in ("", "/lora/fleet"):
            entered = await http.get(f"{prefix}/console")
            assert (entered.status_code, entered.headers["location"]) == (307, "console/")
            index = await http.get(f"{prefix}/console/")
            assert index.status_code == 200
            assert index.headers["content-type"] == "text/html; charset=utf-8"
        for name in load():
            assert (await http.get(f"/console/{name}")).status_code == 200
        assert (await http.post("/console/")).status_code == 401
        assert (await http.get("/consoles")).status_code == 401
        assert (await http.get("/v1/fleet")).status_code == 401


async def test_every_answer_has_the_policy(gateway: RunningGateway) -> None:
    async with gateway.client() as http:
        for path in ("/console", "/console/", "/console/app.js", "/console/vendor/uplot.css"):
            answer = await http.get(path)
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS, path
        tag = answer.headers["etag"]
        same = await http.get("/console/vendor/uplot.css", headers={"if-none-match": tag})
        assert (same.status_code, same.content) == (304, b"")
        assert same.headers["content-security-policy"] == POLICY


async def test_nothing_else_is_served(subtests: pytest.Subtests, gateway: RunningGateway) -> None:
    for name in [
        "nothing.js",
        "../routes.py",
        "..%2froutes.py",
        "vendor",
        "%2e%2e/__init__.py",
        "/etc/passwd",
        "a" * 3000,
    ]:
        with subtests.test(name=name):
            async with gateway.client() as http:
                assert (await http.get(f"/console/{name}")).status_code == 404


def test_the_policy_lets_in_own_files_alone() -> None:
    rules = {rule.split(" ", 1)[0]: rule.split(" ", 1)[1] for rule in POLICY.split("; ")}
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert "unsafe" not in POLICY
    assert "http" not in POLICY


def test_the_page_has_no_code_and_no_style_in_it() -> None:
    page = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=", page) == []
    assert re.findall(r'(?:src|href)="(?:https?:)?//', page) == []
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert set(named) <= load().keys()


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_modules_make_no_markup_of_text(path: Path) -> None:
    code = path.read_text()
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|dangerously|\beval\(|new Function"
    assert re.findall(forbidden, code) == []
    if path.name != "store.js":  # which does not handle keys
        assert "localStorage" not in code
    for name in re.findall(r'from "\./([^"]+)"', code):
        assert name in load(), f"{path.name} imports {name}"
    assert "import" not in code or re.findall(r'from "(?!\./)', code) == []


def test_files_have_kinds_that_are_served() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= KINDS.keys()
    assert sum(path.stat().st_size for path in files) < 300_000


async def test_docs_show_the_api_as_openapi_json_may_be_read(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    """Swagger UI comes with the package: no inline code, nothing from other hosts, and a key if the API needs one."""
    for keys, open_pages, status in ((False, False, 200), (True, False, 401), (True, True, 200)):
        async with gateway_client(bus, model_folder, api_keys=keys, open_pages=open_pages) as http:
            assert (await http.get("/openapi.json")).status_code == status
            for name in ("", "start.js", "vendor/swagger-ui-bundle.js", "vendor/swagger-ui.css"):
                answer = await http.get(f"/docs/{name}")
                assert answer.status_code == status, name
                if status == 200:
                    assert answer.headers["content-security-policy"] == DOCS_POLICY
            entered = await http.get("/docs")
            assert entered.status_code == (307 if status == 200 else 401)
            assert entered.headers.get("location", "docs/") == "docs/"
            assert (await http.get("/docsx")).status_code == (404 if not keys else 401)
    assert "unsafe" not in DOCS_POLICY
    assert "script-src 'self'" in DOCS_POLICY
    page = (DOCS_FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|//", page) == []
    assert all((DOCS_FOLDER / name).is_file() for name in re.findall(r'(?:src|href)="([^"]+)"', page))
    assert re.findall(r'url: "(.*?)"', (DOCS_FOLDER / "start.js").read_text()) == ["../openapi.json"]
