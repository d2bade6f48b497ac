"""Passes a request to its route: checks scopes, and turns errors into responses.

Requests that a gateway makes itself for a batch skip authentication, but pass through here too. Calls, which are nearly
all requests, go directly to their route: FastAPI's wrappers and router would use a sixth of the gateway's CPU for a
known result.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from gateway.auth.callers import CALLER
from gateway.bodies.json_bodies import JsonRoute
from gateway.http.access import MATCH, RouteMatch
from gateway.http.errors import ShapeOf, is_foreseen, let_go, response_to
from protocol.wire.errors import PermissionDenied


class Dispatch:
    """Passes calls to their routes, and all other requests to FastAPI."""

    def __init__(self, app: FastAPI, shape_of: ShapeOf) -> None:
        """app: has its routes already; shape_of: the error format of a request's API."""
        self._app = app
        self._shape_of = shape_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        match: RouteMatch = scope[MATCH]
        try:
            if match.scopes is not None:  # the route needs a key
                scope[CALLER].require(*match.scopes)
        except PermissionDenied as error:
            await self._shape_of(scope).response(error)(scope, receive, send)
            return
        if isinstance(match.route, JsonRoute):
            await match.route.make()
        if match.kind != "call" or not isinstance(match.route, JsonRoute):
            await self._app(scope, receive, send)
            return
        scope["app"], scope["route"] = self._app, match.route  # as FastAPI's router sets them
        has_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await match.route.handle(scope, receive, send_noting)
        except Exception as error:
            if has_begun:
                raise
            await response_to(error, Request(scope), self._shape_of)(scope, receive, send)
            if not is_foreseen(error):
                raise  # an outer layer logs it
            let_go(error)
