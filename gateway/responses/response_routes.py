"""The routes of the Responses API."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.answers.respond import Answers, sent_of
from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute, json_answer, json_response
from gateway.http import openapi
from gateway.http.access import CALL, INFER, TEXT, Routes
from gateway.http.paths import INPUT_TOKENS, RESPONSES
from gateway.responses.response_bodies import InputTokensRequest, ResponseRequest
from gateway.responses.response_parse import check_included
from gateway.responses.response_write import FRAMING, STREAM_ERRORS
from gateway.responses.service import Responses
from protocol.wire.errors import BadRequest

Included = Annotated[list[str] | None, Query(alias="include[]")]
"""Additional contents that clients request: logprobs, which exist only if the response was created with them."""


class ResponseEndpoints:
    """The routes' handlers."""

    def __init__(self, answers: Answers, responses: Responses) -> None:
        self._answers = answers
        self._responses = responses

    async def create(self, body: ResponseRequest, request: Request) -> Response:
        """Answer `POST /v1/responses`."""
        answer = self._responses.create(body, await sent_of(RESPONSES, request), caller_of(request))
        return await self._answers.respond(answer, stream=bool(body.stream), errors=STREAM_ERRORS, framing=FRAMING)

    async def count(self, body: InputTokensRequest, request: Request) -> Response:
        """Answer `POST /v1/responses/input_tokens`."""

        async def answer() -> Response:
            return json_response(await self._responses.count(body, caller_of(request), len(await request.body())))

        return await self._answers.respond(answer())

    async def get(
        self,
        response_id: str,
        request: Request,
        include: Included = None,
        stream: bool = False,
        starting_after: Annotated[int | None, Query(ge=0, lt=1 << 31)] = None,
    ) -> Response:
        """Answer `GET /v1/responses/{id}` with the response, or with its events after a given one."""
        check_included(include)
        if stream:
            after = -1 if starting_after is None else starting_after
            return self._answers.show(await self._responses.stream(response_id, caller_of(request), after))
        if starting_after is not None:
            raise BadRequest("starting_after needs stream=true", param="starting_after")
        return json_answer(await self._responses.get(response_id, caller_of(request)))

    async def cancel(self, response_id: str, request: Request) -> Response:
        """Answer `POST /v1/responses/{id}/cancel`."""
        return json_answer(await self._responses.cancel(response_id, caller_of(request)))

    async def delete(self, response_id: str, request: Request) -> Response:
        """Answer `DELETE /v1/responses/{id}`."""
        return json_response(await self._responses.delete(response_id, caller_of(request)))

    async def input_items(
        self,
        response_id: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        include: Included = None,
    ) -> Response:
        """Answer `GET /v1/responses/{id}/input_items`."""
        check_included(include)
        caller = caller_of(request)
        page = await self._responses.input_items(response_id, caller, limit, after, newest_first=order == "desc")
        return json_answer(page)


def add_response_routes(app: FastAPI, responses: ResponseEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    one = f"{RESPONSES}/{{response_id}}"
    routes.post(RESPONSES, CALL, responses=openapi.RESPONDED)(responses.create)
    routes.post(INPUT_TOKENS, TEXT, responses=openapi.INPUT_TOKENS)(responses.count)
    routes.get(one, INFER, responses=openapi.RESPONDED)(responses.get)
    routes.delete(one, INFER, responses=openapi.DELETED)(responses.delete)
    routes.post(f"{one}/cancel", INFER, responses=openapi.RESPONSE)(responses.cancel)
    routes.get(f"{one}/input_items", INFER, responses=openapi.PAGE)(responses.input_items)
