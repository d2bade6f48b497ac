"""The routes of the Conversations API."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute, json_answer, json_response
from gateway.http import openapi
from gateway.http.access import INFER, Routes
from gateway.http.paths import CONVERSATIONS
from gateway.responses.conversations import Conversations
from gateway.responses.response_bodies import ConversationChange, ConversationRequest, NewItems
from gateway.responses.response_parse import check_included
from gateway.responses.response_routes import Included


class ConversationEndpoints:
    """The routes' handlers."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations

    async def create(self, body: ConversationRequest, request: Request) -> Response:
        """Answer `POST /v1/conversations`."""
        return json_response(await self._conversations.create(body, caller_of(request)))

    async def get(self, conversation_id: str, request: Request) -> Response:
        """Answer `GET /v1/conversations/{id}`."""
        return json_response(await self._conversations.get(conversation_id, caller_of(request)))

    async def update(self, conversation_id: str, body: ConversationChange, request: Request) -> Response:
        """Answer `POST /v1/conversations/{id}`."""
        return json_response(await self._conversations.update(conversation_id, body.metadata, caller_of(request)))

    async def delete(self, conversation_id: str, request: Request) -> Response:
        """Answer `DELETE /v1/conversations/{id}`."""
        return json_response(await self._conversations.delete(conversation_id, caller_of(request)))

    async def add(self, conversation_id: str, body: NewItems, request: Request, include: Included = None) -> Response:
        """Answer `POST /v1/conversations/{id}/items`."""
        check_included(include)
        return json_answer(await self._conversations.add(conversation_id, body.items, caller_of(request)))

    async def items(
        self,
        conversation_id: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        include: Included = None,
    ) -> Response:
        """Answer `GET /v1/conversations/{id}/items`."""
        check_included(include)
        caller = caller_of(request)
        page = await self._conversations.page(conversation_id, caller, limit, after, newest_first=order == "desc")
        return json_answer(page)

    async def item(self, conversation_id: str, item_id: str, request: Request, include: Included = None) -> Response:
        """Answer `GET /v1/conversations/{id}/items/{item}`."""
        check_included(include)
        return json_answer(await self._conversations.item(conversation_id, item_id, caller_of(request)))

    async def delete_item(self, conversation_id: str, item_id: str, request: Request) -> Response:
        """Answer `DELETE /v1/conversations/{id}/items/{item}`."""
        return json_response(await self._conversations.delete_item(conversation_id, item_id, caller_of(request)))


def add_conversation_routes(app: FastAPI, conversations: ConversationEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    one = f"{CONVERSATIONS}/{{conversation_id}}"
    item = f"{one}/items/{{item_id}}"
    routes.post(CONVERSATIONS, INFER, responses=openapi.CONVERSATION)(conversations.create)
    routes.get(one, INFER, responses=openapi.CONVERSATION)(conversations.get)
    routes.post(one, INFER, responses=openapi.CONVERSATION)(conversations.update)
    routes.delete(one, INFER, responses=openapi.DELETED)(conversations.delete)
    routes.post(f"{one}/items", INFER, responses=openapi.PAGE)(conversations.add)
    routes.get(f"{one}/items", INFER, responses=openapi.PAGE)(conversations.items)
    routes.get(item, INFER, responses=openapi.ITEM)(conversations.item)
    routes.delete(item, INFER, responses=openapi.CONVERSATION)(conversations.delete_item)
