"""The routes of OpenAI's completions and of jobs."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.answers.respond import Answers, sent_of
from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute, json_answer, json_response
from gateway.http import openapi
from gateway.http.access import CALL, INFER, Routes
from gateway.http.paths import CHAT, COMPLETIONS
from gateway.jobs.jobs import JobStatus
from gateway.openai.openai_bodies import AnyRequest, ChatRequest, CompletionRequest
from gateway.openai.openai_calls import OpenAICalls

_PREFER_WAIT = re.compile(r"\bwait=(\d{1,6})\b")


class OpenAIEndpoints:
    """The routes' handlers."""

    def __init__(self, answers: Answers, calls: OpenAICalls) -> None:
        self._answers = answers
        self._calls = calls
        self._jobs = calls.jobs

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer `/v1/chat/completions`."""
        return await self._generate(CHAT, body, request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Answer `/v1/completions`."""
        return await self._generate(COMPLETIONS, body, request)

    async def _generate(self, endpoint: str, body: AnyRequest, request: Request) -> Response:
        sent = await sent_of(endpoint, request)
        stream = bool(body.stream) and not body.background
        return await self._answers.respond(self._calls.answer(body, sent, caller_of(request)), stream=stream)

    # ------------------------------------------------------------ jobs

    async def jobs(
        self,
        request: Request,
        status: JobStatus | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        model: str | None = None,
    ) -> Response:
        """Answer `/v1/jobs`."""
        return json_response(await self._jobs.list(caller_of(request), status, limit, after, model))

    async def job(self, jid: str, request: Request) -> Response:
        """Answer `/v1/jobs/{jid}`."""
        # A draining gateway answers at once.
        wait = None if self._answers.draining else _PREFER_WAIT.search(request.headers.get("prefer", ""))
        return json_answer(await self._jobs.get(jid, caller_of(request), float(wait[1]) if wait else 0.0))

    async def stream_job(self, jid: str, request: Request) -> Response:
        """Answer `/v1/jobs/{jid}/stream`."""
        after = request.headers.get("last-event-id", "")
        return self._answers.show(await self._jobs.stream(jid, caller_of(request), after))

    async def cancel_job(self, jid: str, request: Request) -> Response:
        """Answer `/v1/jobs/{jid}/cancel`."""
        return json_answer(await self._jobs.cancel(jid, caller_of(request)))

    async def delete_job(self, jid: str, request: Request) -> Response:
        """Answer `DELETE /v1/jobs/{jid}`."""
        return json_response(await self._jobs.delete(jid, caller_of(request)))


def add_openai_routes(app: FastAPI, endpoints: OpenAIEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    routes.post(CHAT, CALL, responses=openapi.GENERATED)(endpoints.chat)
    routes.post(COMPLETIONS, CALL, responses=openapi.GENERATED)(endpoints.completions)
    routes.get("/v1/jobs", INFER, responses=openapi.PAGE)(endpoints.jobs)
    routes.get("/v1/jobs/{jid}", INFER, responses=openapi.JOB)(endpoints.job)
    routes.get("/v1/jobs/{jid}/stream", INFER, responses=openapi.STREAMED)(endpoints.stream_job)
    routes.delete("/v1/jobs/{jid}", INFER, responses=openapi.DELETED)(endpoints.delete_job)
    routes.post("/v1/jobs/{jid}/cancel", INFER, responses=openapi.JOB)(endpoints.cancel_job)
