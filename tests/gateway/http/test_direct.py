"""Calls go past FastAPI: what they are answered must not differ from what FastAPI would answer."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.app.direct import DirectCalls
from gateway.auth.callers import CALLER, EVERYBODY, Caller
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.http.access import CALL, INFER, MATCH, Routes, RouteTable
from gateway.http.errors import OPENAI_ERRORS, add_handlers, let_go
from gateway.http.paths import COMPLETIONS
from gateway.openai.openai_bodies import CompletionRequest
from protocol.queue.connection.redis_client import MemoryFull
from protocol.runtime.settings import Settings
from protocol.wire.errors import NotFound

JSON = "application/json"

FAULTS = {"own": NotFound("nothing is here"), "queue": ConnectionError("gone"), "memory": MemoryFull("full"),
          "fault": ZeroDivisionError()}  # fmt: skip


def known(app: FastAPI, way: ASGIApp, caller: Caller = EVERYBODY) -> ASGIApp:
    """Return a way that is asked as in a gateway: by a caller who is known, for a route that was found."""
    table = RouteTable(app.routes)

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        await way({**scope, CALLER: caller, MATCH: table.match(scope["method"], scope["path"])}, receive, send)

    return asked


def both(caller: Caller = EVERYBODY) -> tuple[ASGIApp, ASGIApp]:
    """Return the two ways of one application: past FastAPI, and through it."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.settings = Settings()
    add_handlers(app, lambda _: OPENAI_ERRORS)
    routes = Routes(app, JsonRoute)

    async def answer(body: CompletionRequest, request: Request) -> Response:
        if body.model_name in FAULTS:
            raise FAULTS[body.model_name]
        return json_response(
            {"prompt": body.prompt, "n": body.n, "path": request.url.path, "sent": len(await request.body())}
        )

    async def other(body: CompletionRequest, request: Request) -> Response:
        return json_response({"other": body.prompt, "path": request.url.path})

    routes.post(COMPLETIONS, CALL)(answer)
    routes.get(COMPLETIONS, INFER)(lambda: {"got": True})
    routes.post("/v1/other", INFER)(other)
    return known(app, DirectCalls(app, lambda _: OPENAI_ERRORS), caller), known(app, app, caller)


async def asked(app: Any, method: str, path: str, body: bytes, content_type: str | None) -> tuple[int, Any, bytes]:
    """Return status, headers and body of an answer."""
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    headers = {} if content_type is None else {"content-type": content_type}
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.request(method, path, content=body, headers=headers)
    return answer.status_code, sorted(answer.headers.multi_items()), answer.content


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/other", "/v1/none"])
@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"model":"base","prompt":"hi","n":2}', JSON),
        (b'{"model":"base","prompt":"hi"}', "application/json; charset=utf-8"),
        (b'{"model":"base","prompt":"hi"}', "Application/JSON"),
        (b'{"model":"base","prompt":"hi"}', "application/vnd.api+json"),
        (b'{"model":"base","prompt":"hi"}', "application/a/b+json"),
        (b'{"model":"base","prompt":"hi"}', "application/jsonp"),
        (b'{"model":"base","prompt":"hi"}', "application"),
        (b'{"model":"base","prompt":"hi"}', "text/json"),
        (b'{"model":"base","prompt":"hi"}', "text/plain"),
        (b'{"model":"base","prompt":"hi"}', ""),
        (b'{"model":"base","prompt":"hi"}', None),
        (b"", JSON),
        (b"", None),
        (b"prompt=hi", "application/x-www-form-urlencoded"),
        (b"{", JSON),
        (b'{"model":"base","prompt":"\xff"}', JSON),
        (b"null", JSON),
        (b"[1]", JSON),
        (b'"text"', JSON),
        (b"{}", JSON),
        (b'{"model":"base","prompt":"hi","unknown":1}', JSON),
        (b'{"model":"base","prompt":3,"n":0}', JSON),
        (b'{"model":"base","prompt":"hi","n":"2"}', JSON),
        (b"[" * 200 + b"]" * 200, JSON),
        *((b'{"model":"%b","prompt":"hi"}' % fault.encode(), JSON) for fault in FAULTS),
    ],
)  # fmt: skip
async def test_a_call_is_answered_as_by_fastapi(path: str, body: bytes, content_type: str | None) -> None:
    """Status, headers and body are the same, whatever is sent."""
    direct, app = both()
    assert await asked(direct, "POST", path, body, content_type) == await asked(app, "POST", path, body, content_type)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "DELETE"])
async def test_other_methods_of_a_calls_path_go_to_fastapi(method: str) -> None:
    """Only POST is a call."""
    direct, app = both()
    assert await asked(direct, method, COMPLETIONS, b"", None) == await asked(app, method, COMPLETIONS, b"", None)


def test_a_handler_that_takes_more_is_refused_at_the_start() -> None:
    """Nothing would give it the rest."""
    app = FastAPI(openapi_url=None)

    async def answer(body: CompletionRequest, request: Request, wish: str) -> Response:
        return json_response([body.prompt, request.url.path, wish])

    Routes(app, JsonRoute).post(COMPLETIONS, CALL)(answer)
    with pytest.raises(TypeError, match="wish"):
        DirectCalls(app, lambda _: OPENAI_ERRORS)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/other"])
async def test_scopes_hold_where_nothing_authenticates(path: str) -> None:
    """What a gateway asks of itself passes no authentication, and is checked where it is dispatched."""
    body = b'{"model":"fault","prompt":"hi"}'
    direct, _ = both(Caller(scopes=("adapters",)))
    status, _, text = await asked(direct, "POST", path, body, JSON)
    assert (status, b"insufficient_scope" in text) == (403, True)


async def test_a_fault_is_answered_and_raised_to_be_logged() -> None:
    """The client is told, and the wrapper outside hears of it, as from FastAPI."""
    for app in both():
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
            with pytest.raises(ZeroDivisionError):
                await client.post(COMPLETIONS, json={"model": "fault", "prompt": "hi"})


def test_errors_that_follow_each_other_are_let_go() -> None:
    first, second = NotFound("first"), NotFound("second")
    for error in (first, second):
        with pytest.raises(NotFound):
            raise error
    first.__cause__, second.__cause__ = second, first  # as when each is raised again where the other was caught
    let_go(first)
    assert (first.__traceback__, second.__traceback__) == (None, None)
