"""Dispatch to routes: scopes are checked, all routes read bodies the same way, and errors become responses."""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request, routing
from fastapi.routing import APIRoute
from helpers.waiting import wait_until
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.app.dispatch import Dispatch
from gateway.auth.callers import CALLER, EVERYBODY, Caller
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.http.access import CALL, INFER, MATCH, Routes, RouteTable
from gateway.http.errors import OPENAI_ERRORS, add_handlers, let_go
from gateway.http.paths import COMPLETIONS
from gateway.openai.openai_bodies import CompletionRequest
from gateway.overload.large import Checks
from protocol.queue.connection.redis_client import MemoryFull
from protocol.runtime.settings import Settings
from protocol.wire.errors import NotFound

JSON = "application/json"

FAULTS = {"own": NotFound("nothing is here"), "queue": ConnectionError("gone"), "memory": MemoryFull("full"),
          "fault": ZeroDivisionError()}  # fmt: skip


def known(app: FastAPI, way: ASGIApp, caller: Caller = EVERYBODY) -> ASGIApp:
    """Wrap a handler so that each request has a known caller and a matched route, as in a gateway."""
    table = RouteTable(app.routes)

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        await way({**scope, CALLER: caller, MATCH: table.match(scope["method"], scope["path"])}, receive, send)

    return asked


def gateway_for(caller: Caller = EVERYBODY) -> ASGIApp:
    """Return an application with a call and another route that take the same body."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.settings, app.state.checks = Settings(), Checks()
    add_handlers(app, lambda _: OPENAI_ERRORS)
    routes = Routes(app, JsonRoute)

    async def answer(body: CompletionRequest, request: Request) -> Response:
        if body.model in FAULTS:
            raise FAULTS[body.model]
        return json_response({"prompt": body.prompt, "n": body.n, "sent": len(await request.body())})

    routes.post(COMPLETIONS, CALL)(answer)
    routes.get(COMPLETIONS, INFER)(lambda: {"got": True})
    routes.post("/v1/other", INFER)(answer)
    return known(app, Dispatch(app, lambda _: OPENAI_ERRORS), caller)


async def asked(app: Any, method: str, path: str, body: bytes, content_type: str | None) -> tuple[int, Any, bytes]:
    """Return status, headers and body of an answer."""
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    headers = {} if content_type is None else {"content-type": content_type}
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.request(method, path, content=body, headers=headers)
    return answer.status_code, sorted(answer.headers.multi_items()), answer.content


BODIES: list[tuple[int, bytes, str | None]] = [
    (200, b'{"model":"base","prompt":"hi","n":2}', JSON),
    (200, b'{"model":"base","prompt":"hi"}', "application/json; charset=utf-8"),
    (200, b'{"model":"base","prompt":"hi"}', "Application/JSON"),
    (200, b'{"model":"base","prompt":"hi"}', "application/vnd.api+json"),
    (400, b'{"model":"base","prompt":"hi"}', "application/a/b+json"),
    (400, b'{"model":"base","prompt":"hi"}', "application/jsonp"),
    (415, b'{"model":"base","prompt":"hi"}', "application"),
    (400, b'{"model":"base","prompt":"hi"}', "text/json"),
    (415, b'{"model":"base","prompt":"hi"}', "text/plain"),
    (400, b'{"model":"base","prompt":"hi"}', ""),
    (400, b'{"model":"base","prompt":"hi"}', None),
    (400, b"", JSON),
    (400, b"", None),
    (415, b"prompt=hi", "application/x-www-form-urlencoded"),
    (400, b"{", JSON),
    (400, b'{"model":"base","prompt":"\xff"}', JSON),
    (400, b"null", JSON),
    (400, b"[1]", JSON),
    (400, b'"text"', JSON),
    (400, b"{}", JSON),
    (400, b'{"model":"base","prompt":"hi","unknown":1}', JSON),
    (400, b'{"model":"base","prompt":3,"n":0}', JSON),
    (400, b'{"model":"base","prompt":"hi","n":"2"}', JSON),
    (400, b"[" * 200 + b"]" * 200, JSON),
    *((status, b'{"model":"%b","prompt":"hi"}' % fault.encode(), JSON)
      for fault, status in (("own", 404), ("queue", 503), ("memory", 503), ("fault", 500))),
]  # fmt: skip


async def test_a_calls_body_is_not_held_while_its_answer_is_sent() -> None:
    """It would be freed when the answer has been sent, on the event loop, which takes milliseconds for megabytes."""
    app, held = FastAPI(openapi_url=None), list[bool]()

    async def answer(body: CompletionRequest, request: Request) -> Response:
        bodies = [weakref.ref(body)]

        class Answer(Response):
            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                held.append(bodies[0]() is not None)
                await super().__call__(scope, receive, send)

        return Answer()

    app.state.settings, app.state.checks = Settings(), Checks()
    Routes(app, JsonRoute).post(COMPLETIONS, CALL)(answer)
    status, *_ = await asked(
        known(app, Dispatch(app, lambda _: OPENAI_ERRORS)), "POST", COMPLETIONS, b'{"model":"base","prompt":"hi"}', JSON
    )
    assert (status, held) == (200, [False])


async def test_calls_and_other_routes_read_bodies_alike(subtests: pytest.Subtests) -> None:
    """Status, headers and body are the same for any request, although FastAPI parses the arguments of other routes."""
    app = gateway_for()
    for status, body, content_type in BODIES:
        with subtests.test(body=body[:50], content_type=content_type):
            answer = await asked(app, "POST", COMPLETIONS, body, content_type)
            assert answer[0] == status
            assert answer == await asked(app, "POST", "/v1/other", body, content_type)


async def test_a_route_is_made_in_a_thread_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI takes milliseconds to build a route, and 25 ms for the first of a process."""
    made: list[tuple[str, int]] = []
    fill = APIRoute.__init__

    def noted(route: APIRoute, path: str, *args: Any, **options: Any) -> None:
        made.append((path, threading.get_ident()))
        fill(route, path, *args, **options)

    monkeypatch.setattr(APIRoute, "__init__", noted)
    app = gateway_for()
    first = asyncio.create_task(asked(app, "POST", "/v1/other", b"{}", JSON))
    await asyncio.sleep(0)
    first.cancel()  # what it has started completes for the others
    calls = (asked(app, "POST", path, BODIES[0][1], JSON) for path in (COMPLETIONS, "/v1/other") for _ in range(20))
    assert {status for status, _, _ in await asyncio.gather(*calls)} == {200}
    assert sorted(path for path, _ in made) == sorted([COMPLETIONS, "/v1/other"])  # GET has not been requested
    assert threading.get_ident() not in {thread for _, thread in made}


@pytest.mark.parametrize("early", [True, False])
async def test_a_route_whose_making_failed_is_made_again(monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    owner, name = (APIRoute, "__init__") if early else (routing, "_extract_endpoint_context")
    make, num = getattr(owner, name), 0

    def fail_once(*args: Any, **options: Any) -> Any:
        nonlocal num
        num += 1
        if num == 1:
            raise MemoryError
        return make(*args, **options)

    monkeypatch.setattr(owner, name, fail_once)
    app = gateway_for()
    told = [(await asked(app, "POST", COMPLETIONS, BODIES[0][1], JSON))[0] for _ in range(3)]
    assert told == [500, 200, 200]


async def test_the_loop_goes_on_while_another_thread_makes_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    make, begun, go = routing._get_body_field, threading.Event(), threading.Event()  # type: ignore[attr-defined]

    def wait(**options: Any) -> Any:
        begun.set()
        assert go.wait(60)
        return make(**options)

    monkeypatch.setattr(routing, "_get_body_field", wait)
    app = gateway_for()
    first = asyncio.create_task(asked(app, "POST", COMPLETIONS, BODIES[0][1], JSON))
    await wait_until(begun.is_set, "the route is being made")
    first.cancel()
    second = asyncio.create_task(asked(app, "POST", COMPLETIONS, BODIES[0][1], JSON))
    for _ in range(20):  # a loop blocked by the thread would never set `go`
        await asyncio.sleep(0)
    go.set()
    assert (await second)[0] == 200


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("HEAD", 405), ("PUT", 405), ("OPTIONS", 405)])
async def test_other_methods_of_a_calls_path_are_no_calls(method: str, status: int) -> None:
    assert (await asked(gateway_for(), method, COMPLETIONS, b"", None))[0] == status


def test_a_handler_that_takes_more_is_refused_at_the_start() -> None:
    """Nothing would provide the extra argument."""
    app = FastAPI(openapi_url=None)

    async def answer(body: CompletionRequest, request: Request, wish: str) -> Response:
        return json_response([body.prompt, request.url.path, wish])

    with pytest.raises(TypeError, match="wish"):
        Routes(app, JsonRoute).post(COMPLETIONS, CALL)(answer)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/other"])
async def test_scopes_hold_where_nothing_authenticates(path: str) -> None:
    """Requests that a gateway sends to itself skip authentication, and are checked at dispatch."""
    body = b'{"model":"fault","prompt":"hi"}'
    status, _, text = await asked(gateway_for(Caller(scopes=("adapters",))), "POST", path, body, JSON)
    assert (status, b"insufficient_scope" in text) == (403, True)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/other"])
async def test_a_fault_is_answered_and_raised_to_be_logged(path: str) -> None:
    """The client gets an error, and the exception is raised to the outer wrapper."""
    transport = httpx2.ASGITransport(app=gateway_for())
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        with pytest.raises(ZeroDivisionError):
            await client.post(path, json={"model": "fault", "prompt": "hi"})


def test_errors_that_follow_each_other_are_let_go() -> None:
    first, second = NotFound("first"), NotFound("second")
    for error in (first, second):
        with pytest.raises(NotFound):
            raise error
    first.__cause__, second.__cause__ = second, first  # as when each is raised again where the other was caught
    let_go(first)
    assert (first.__traceback__, second.__traceback__) == (None, None)
