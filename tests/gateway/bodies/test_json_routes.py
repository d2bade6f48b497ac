"""Routes compute most of their properties lazily, exactly once, and check their handlers' signatures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from gateway.bodies.json_bodies import JsonRoute
from gateway.bodies.parameter_check import JsonBody
from gateway.http.access import CALL, TEXT, RouteAccess, Routes


class Body(JsonBody):
    """A body with one parameter."""

    text: str


async def handler(body: Body, request: Request) -> Response:
    """Return an empty response."""
    return Response()


def route_of(path: str, endpoint: Any, access: RouteAccess = CALL) -> JsonRoute:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    Routes(app, JsonRoute).post(path, access)(endpoint)
    (route,) = app.routes
    assert isinstance(route, JsonRoute)
    return route


def test_a_route_is_found_before_the_rest_of_it_is_made() -> None:
    route = route_of("/things/{name}", handler)
    assert (route.path, route.methods, set(route.param_convertors)) == ("/things/{name}", {"POST"}, {"name"})
    assert "body_field" not in vars(route)
    assert route.body_field is not None
    assert route.body_field.field_info.annotation is Body
    assert (route.path, route.methods) == ("/things/{name}", {"POST"})


def test_many_threads_may_ask_first() -> None:
    for _ in range(20):
        route, start = route_of("/things", handler), Barrier(8)

        def ask(route: JsonRoute = route, start: Barrier = start) -> Any:
            start.wait()
            return route.body_field, route.dependant

        with ThreadPoolExecutor(8) as pool:
            found = [future.result() for future in [pool.submit(ask) for _ in range(8)]]
        assert len({id(body_field) for body_field, _ in found}) == 1


def test_what_it_does_not_have_is_an_attribute_error() -> None:
    route = route_of("/things", handler)
    for _ in range(2):
        with pytest.raises(AttributeError, match="JsonRoute has no colour"):
            route.colour  # noqa: B018


def test_a_handler_of_a_call_takes_its_body_and_the_request_alone() -> None:
    async def other(body: Body, request: Request, name: str) -> Response:
        return Response()

    with pytest.raises(TypeError, match="takes body, request, name; calls have body and request"):
        route_of("/things/{name}", other)
    route_of("/things/{name}", other, TEXT)
