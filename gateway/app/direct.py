"""The way past FastAPI for calls, which are nearly all that a gateway is asked.

FastAPI describes every route, and serves those that are asked now and then. On the way of a call its wrappers, its
router and its solver of dependencies would take a fifth of the gateway's time, for nothing that a call needs: its route
is known, and has one body of one type.

Here every request comes to its route, also those that a gateway asks of itself for a batch, which do not pass
authentication. So what the route needs is checked here too.
"""

from __future__ import annotations

import inspect
import json
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from gateway.auth.callers import CALLER
from gateway.bodies.json_bodies import JsonRoute, body_value, note_form
from gateway.http.access import MATCH, Match
from gateway.http.errors import ShapeOf, is_foreseen, let_go, response_to
from gateway.http.headers import header_of
from gateway.overload.large import working
from gateway.overload.memory import hold_values
from protocol.wire.errors import PermissionDenied


class DirectCalls:
    """Answers calls as FastAPI would, and hands it everything else."""

    def __init__(self, app: FastAPI, shape_of: ShapeOf) -> None:
        """`app`: has its routes already; `shape_of`: how errors of a request are written.

        Raises TypeError for a call whose handler takes more than its body and the request.
        """
        self._app = app
        self._shape_of = shape_of
        for route in app.routes:
            if isinstance(route, JsonRoute) and route.access.kind == "call":
                taken = list(inspect.signature(route.endpoint).parameters)
                if taken != ["body", "request"]:
                    raise TypeError(
                        f"the handler of {route.path} takes {', '.join(taken)}; calls have body and request"
                    )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        match: Match = scope[MATCH]
        route = match.route
        try:
            scope[CALLER].require(*match.scopes or ())
        except PermissionDenied as error:
            await self._shape_of(scope).response(error)(scope, receive, send)
            return
        if match.kind != "call" or not isinstance(route, JsonRoute):
            await self._app(scope, receive, send)
            return
        scope["app"], scope["route"] = self._app, route  # as FastAPI's router sets them
        request = Request(scope, receive)
        has_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            try:
                await request.body()
            except ClientDisconnect:
                raise HTTPException(400, "the client left before its body was complete") from None
            async with working():
                response = await route.endpoint(body=_checked(route, await request.body(), request), request=request)
            del request  # and its body with it, which is not held until the answer's end
            await response(scope, receive, send_noting)
        except Exception as error:
            if has_begun:
                raise
            await response_to(error, Request(scope), self._shape_of)(scope, receive, send)
            if not is_foreseen(error):
                raise  # it is logged outside
            let_go(error)


def _checked(route: JsonRoute, raw: bytes, request: Request) -> Any:
    """Return a body as the route's type. Raises HTTPException and RequestValidationError as FastAPI does."""
    refused = partial(RequestValidationError, body=None)
    if not raw:
        raise refused([{"type": "missing", "loc": ("body",), "msg": "", "input": None}])
    if not route.any_type and not _is_json(header_of(request.scope["headers"], b"content-type") or ""):
        raise refused([{"type": "model_type", "loc": ("body",), "msg": "", "input": None}])
    hold_values(raw)
    try:
        value = body_value(raw)
    except json.JSONDecodeError as error:
        place = {"loc": ("body", error.pos), "ctx": {"error": error.msg}}
        raise refused([{"type": "json_invalid", "msg": "", "input": {}, **place}]) from error
    note_form(request.scope, value)
    assert route.body_field is not None
    body, errors = route.body_field.validate(value, {}, loc=("body",))
    if errors:
        raise refused(errors)
    return body


def _is_json(content_type: str) -> bool:
    """Return whether a media type is JSON: `application/json`, or one that ends in `+json`."""
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or (subtype.endswith("+json") and "/" not in subtype))
