"""Each route declares the scope it needs; no spelling of its path and no other entry point bypasses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import unquote

import httpx2
import pytest
from fastapi import FastAPI
from helpers.scripted_fleet import RunningGateway, ScriptedFleet, running_gateway
from starlette.responses import Response
from starlette.routing import Mount, Route

from gateway.app import access_table
from gateway.app.access_table import CONTROLS, PAGE, SPELLINGS, example_of, unserved, with_tables
from gateway.app.app import Envelope
from gateway.app.dispatch import Dispatch
from gateway.app.shapes import shape_of
from gateway.auth.authentication import Authentication
from gateway.auth.callers import Caller
from gateway.bodies.json_bodies import JsonRoute
from gateway.http.access import ADMIN, INFER, MAX_PATH_CHARACTERS, MAX_QUERY_FIELDS, Routes, RouteTable, normal_path
from gateway.http.paths import BATCH_ENDPOINTS
from gateway.overload.gate import Gate
from gateway.overload.memory import MemoryAccount
from protocol.queue.books.api_keys import ApiKey, Tenant
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, PermissionDenied

KEYS: dict[str, tuple[str, ...]] = {
    "sk-lf-infer": ("infer",), "sk-lf-adapters": ("adapters",), "sk-lf-both": ("infer", "adapters"),
    "sk-lf-admin": ("admin",),
}  # fmt: skip
STRANGERS = ("", "sk-lf-unknown")
REFUSALS = {400, 401, 403, 404, 405, 413, 422}


class Known:
    """The keys of a fleet, in place of the queue."""

    async def find(self, key: str) -> tuple[ApiKey, Tenant] | None:
        return (ApiKey("key_1", "acme", list(KEYS[key]), 0), Tenant("acme")) if key in KEYS else None


class Let:
    """An admission that lets every call in and counts them."""

    def __init__(self) -> None:
        self.num = 0

    def check(self) -> None:
        self.num += 1

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class Front:
    """The middlewares in front of the handlers, and handlers that record that they ran."""

    def __init__(self, **settings: Any) -> None:
        self.app = unserved()
        self.ran: list[JsonRoute] = []
        self.admission = Let()
        self.app.state.settings = Settings()
        for route in self.app.routes:
            assert isinstance(route, JsonRoute)
            self._watch(route)
        self.table = RouteTable(self.app.routes, open_pages=bool(settings.get("open_pages")))
        admission, keys, memory = cast(Any, self.admission), cast(Any, Known()), MemoryAccount(1 << 30)
        gate = Gate(Dispatch(self.app, shape_of), shape_of, admission, Authentication(keys), memory, 1 << 20)
        self.outside = Envelope(gate, Settings(**settings), self.table)

    def _watch(self, route: JsonRoute) -> None:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            self.ran.append(route)
            await Response()(scope, receive, send)

        async def call(body: Any, request: Any) -> Response:
            self.ran.append(route)
            return Response()

        assert route.dependant.path == route.path_format  # computes all cached parts before some are replaced
        route.app = answer  # called by the router
        if route.access.kind == "call":  # called without the router
            route.endpoint = call
            route.body_field = SimpleNamespace(validate=lambda *_, **__: (None, []))  # type: ignore[assignment]

    async def ask(self, method: str, raw: str, key: str = "") -> tuple[int, list[JsonRoute]]:
        """Send a request with a raw path; return the status and the routes that ran."""
        headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
        headers += [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {
            "type": "http", "method": method, "path": unquote(raw), "raw_path": raw.encode(), "root_path": "",
            "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "server": None, "scheme": "http",
            "http_version": "1.1",
        }  # fmt: skip
        status, self.ran = 0, []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        await self.outside(scope, receive, send)
        return status, self.ran


def may(route: JsonRoute, key: str) -> bool:
    """Return whether the table in the documentation allows a key to use a route."""
    scopes = route.access.scopes
    if scopes is None:
        return True
    return key in KEYS and (not scopes or "admin" in KEYS[key] or bool(set(scopes) & set(KEYS[key])))


@pytest.fixture(scope="module")
def front() -> Front:
    return Front()


async def test_each_route_answers_the_keys_that_it_names(front: Front) -> None:
    assert len(front.table.matches) > 100
    for method, match in front.table.matches:
        for key in (*STRANGERS, *KEYS):
            status, ran = await front.ask(method, example_of(match.path), key)
            allowed = may(match.route, key)  # type: ignore[arg-type]
            assert status == (200 if allowed else 401 if key in STRANGERS else 403), (method, match.path, key)
            assert ran == ([match.route] if allowed else []), (method, match.path, key)


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_no_spelling_of_a_path_gets_past_its_scope(spelling: str, front: Front) -> None:
    """Every handler that runs belongs to a route whose scope the key has; each path resolves to at most one route."""
    tried = 0
    for method, match in front.table.matches:
        for raw in SPELLINGS[spelling](example_of(match.path)):
            for key in (STRANGERS[1], "sk-lf-infer", "sk-lf-adapters"):
                tried += 1
                status, ran = await front.ask(method, raw, key)
                assert all(may(route, key) for route in ran), (method, raw, key)
                assert status in REFUSALS or len(ran) == 1, (method, raw, key, status)
                if not may(match.route, key):  # type: ignore[arg-type]
                    assert match.route not in ran, (method, raw, key)
    assert tried > 300


async def test_a_control_character_in_a_path_is_400_for_all(front: Front) -> None:
    before = front.admission.num
    for escaped in (*CONTROLS, "%C2%85", "%E2%80%A8", "%FF"):
        for path in ("/v1/keys", "/v1/chat/completions", "/health", "/v1/adapters/x/pin", "/console/"):
            for raw in (path + escaped, f"/{escaped}{path[1:]}", f"{path[:4]}{escaped}{path[4:]}"):
                for method in ("GET", "POST", "OPTIONS"):
                    for key in ("", "sk-lf-infer", "sk-lf-admin"):
                        assert await front.ask(method, raw, key) == (400, []), (method, raw, key)
    assert front.admission.num == before


async def test_whoever_has_no_key_learns_no_routes(front: Front) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        for path in (
            "/nowhere",
            "/v1/keys/",
            "/v1/chat/completionss",
            "/v1/",
            "///",
            "/v1/keys/x/y",
            "/swagger",
            "/redoc",
            "/docsx",
        ):
            if front.table.match(method, path).scopes is not None:
                assert await front.ask(method, path) == (401, []), (method, path)
                assert (await front.ask(method, path, "sk-lf-infer"))[0] in {403, 404, 405}


async def test_every_call_is_admitted_however_it_is_spelled(front: Front) -> None:
    for raw in ("/v1/completions", "/v1/completions/", "/v1%2Fcompletions", "/v1/%63ompletions"):
        before = front.admission.num
        status, ran = await front.ask("POST", raw, "sk-lf-infer")
        assert (status, [route.path for route in ran]) == (200, ["/v1/completions"])
        assert front.admission.num == before + 1


async def test_a_prefix_is_taken_off_once_and_changes_no_scope() -> None:
    front = Front(path_prefix="/tenant/llm/")
    for path, status in (
        ("/tenant/llm/v1/keys", 403), ("/tenant/llm//v1/keys", 404), ("/tenant/llm/tenant/llm/v1/keys", 404),
        ("/tenant/llm%0A/v1/keys", 400), ("/tenant/llmv1/keys", 404), ("/tenant/llm/v1/models", 200), ("/v1/keys", 403),
        ("/tenant/llm", 200), ("/tenant%2Fllm/v1/keys", 403),
    ):  # fmt: skip
        assert (await front.ask("GET", path, "sk-lf-infer"))[0] == status, path


async def test_pages_need_no_key_where_an_operator_opens_them() -> None:
    front = Front(open_pages=True)
    for path, status in (("/metrics", 200), ("/openapi.json", 200), ("/v1/fleet", 200), ("/v1/keys", 401)):
        assert (await front.ask("GET", path))[0] == status
        assert (await front.ask("GET", f"{path}%0A"))[0] == 400
    assert (await front.ask("POST", "/metrics"))[0] == 401


# ------------------------------------------------------------ routes without a declared scope


def _routes() -> dict[str, Callable[[FastAPI], Any]]:
    async def answer() -> Response:
        return Response()

    return {
        "of Starlette": lambda app: app.router.routes.append(Route("/v1/x", answer)),
        "of FastAPI": lambda app: app.get("/v1/x")(answer),
        "a folder": lambda app: app.mount("/v1/x", Response()),
        "a socket": lambda app: app.websocket("/v1/x")(answer),
        "twice": lambda app: [Routes(app, JsonRoute).get("/v1/x", access)(answer) for access in (ADMIN, INFER)],
    }


@pytest.mark.parametrize("how", _routes())
def test_a_route_that_says_nothing_of_its_scope_does_not_start(how: str) -> None:
    app = unserved()
    RouteTable(app.routes)
    _routes()[how](app)
    with pytest.raises(TypeError, match="/v1/x"):
        RouteTable(app.routes)


def test_a_route_of_ours_cannot_be_made_without_its_scope() -> None:
    with pytest.raises(TypeError, match="access"):
        JsonRoute("/v1/x", lambda: None)  # type: ignore[call-arg]


async def test_a_router_runs_only_what_was_found_and_checked() -> None:
    """Even if a path matches, for example in a request that bypassed the front."""
    app = unserved()
    scope = {"type": "http", "method": "GET", "path": "/v1/keys", "headers": [], "query_string": b""}
    for route in app.routes:
        assert not isinstance(route, Mount)
        assert route.matches(scope)[0].name == "NONE"  # type: ignore[attr-defined]


def test_calls_are_what_batches_may_ask() -> None:
    matches = RouteTable(unserved().routes).matches
    calls = {match.path for _, match in matches if match.kind == "call" and match.path.startswith("/v1/")}
    assert calls == BATCH_ENDPOINTS
    assert {method for method, match in matches if match.kind in ("call", "text", "file")} == {"POST"}


def test_the_documentation_has_the_tables_of_now() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page


def test_a_longer_path_costs_nothing() -> None:
    assert normal_path("/" + "a" * (MAX_PATH_CHARACTERS - 1), "") == "/" + "a" * (MAX_PATH_CHARACTERS - 1)
    for path in ("/" + "a" * MAX_PATH_CHARACTERS, "/\x00" + "a" * MAX_PATH_CHARACTERS):
        with pytest.raises(BadRequest, match=f"the limit is {MAX_PATH_CHARACTERS}"):
            normal_path(path, "")


def test_the_spellings_of_the_documentation_lead_to_no_weaker_route() -> None:
    """Files of the console need no key, so paths below it are excluded; any other path must need the same scopes."""
    table = RouteTable(unserved().routes)
    for method, match in table.matches:
        for spell in SPELLINGS.values():
            for raw in spell(example_of(match.path)):
                got = access_table.found(table, method, raw)
                if got is not None and got.route is not None and not got.path.startswith("/console"):
                    assert got.scopes == match.scopes, (method, raw)


def test_one_scope_of_several_is_enough_and_without_any_every_key_will_do() -> None:
    Caller(scopes=()).require()
    Caller(scopes=("adapters",)).require("infer", "adapters")
    Caller(scopes=("admin",)).require("infer", "adapters")
    with pytest.raises(PermissionDenied, match="infer or adapters"):
        Caller(scopes=()).require("infer", "adapters")


# ------------------------------------------------------------ with a gateway


async def sent(gateway: RunningGateway, line: bytes, key: str, body: bytes = b"") -> bytes:
    """Send a raw request line; return the status line of the answer."""
    url = httpx2.URL(gateway.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = b"%s HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\nconnection: close\r\n" % (line, key.encode())
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n")[0]


async def test_a_long_query_is_taken_apart_for_nobody(bus: Bus, model_folder: Path) -> None:
    async with running_gateway(bus, model_folder, api_keys=True) as gateway:
        for path in (b"/health", b"/ping", b"/", b"/v1/keys", b"/v1/jobs/job_x", b"/none"):
            most = b"GET " + path + b"?" + b"&".join([b"a="] * MAX_QUERY_FIELDS)
            wrong = (b"400", b"422")  # as APIs write it
            assert (await sent(gateway, most, "nobody")).split()[1] not in wrong
            assert (await sent(gateway, most + b"&", "nobody")).split()[1] in wrong
            long = b"GET " + path + b"?" + b"%C3" * 2730
            assert (await sent(gateway, long, "nobody")).split()[1] not in wrong
            assert (await sent(gateway, long + b"%C3", "nobody")).split()[1] in wrong


async def test_no_spelling_changes_anything_at_a_gateway(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, subtests: pytest.Subtests
) -> None:
    """With control characters and other bytes in the request line, no request succeeds or changes anything."""
    await fleet.add_adapter("shared", "d1")
    secret, _ = await bus.api_keys.create("acme", ["infer", "adapters"])
    asked: list[tuple[str, bytes]] = [
        ("GET /v1/keys", b""), ("GET /v1/tenants", b""), ("GET /v1/audit", b""), ("GET /v1/workers", b""),
        ("GET /v1/dead_letters", b""), ("GET /v1/fleet", b""), ("GET /metrics", b""),
        ("POST /v1/keys", b'{"tenant":"other"}'), ("POST /v1/tenants/acme", b'{"concurrency":9}'),
        ("POST /v1/workers/w1/drain", b""), ("POST /v1/adapters/shared/pin", b""),
        ("POST /v1/adapters/shared/unpin", b""), ("POST /v1/adapters/shared/evict", b""),
    ]  # fmt: skip
    marks = [
        b"", *map(str.encode, CONTROLS), *(bytes([number]) for number in (*range(1, 33), 127)), b"\xff", b"%ff",
        b"%250a", b"/", b"//", b"/.", b"/..", b";x=1", b"%20", b"%3f", b"%23", b"\\", b"\xc2\x85",
    ]  # fmt: skip
    async with running_gateway(bus, model_folder, api_keys=True, console_keys=True) as gateway:
        for line, body in asked:
            with subtests.test(line=line):
                for mark in marks:
                    told = await sent(gateway, line.encode() + mark, secret, body)
                    assert told[9:12] in (b"400", b"401", b"403", b"404", b"405"), (line, mark, told)
        assert [key.tenant for key, _ in await bus.api_keys.all()] == ["acme"]
        assert (await bus.api_keys.tenant("acme")).concurrency == 0
        assert await bus.adapters.pins() == {}
        assert await bus.audit.newest(10) == []
        assert b" 200 " in await sent(gateway, b"GET /v1/models", secret), "the check would prove nothing"
