"""The HTTP routes. Each reads its request, calls what knows the answer, and wraps it."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway.auth.callers import Caller, caller_of
from gateway.calls.calls import AnyRequest, Calls, body_hash
from gateway.calls.jobs import Jobs, JobStatus
from gateway.http import openapi
from gateway.http.keep_alive import KeepAliveResponse
from gateway.openai.api import CHAT, COMPLETIONS, ChatRequest, CompletionRequest
from protocol.wire.errors import BadRequest, Unavailable

MAX_KEY_CHARACTERS = 255
MAX_DEPTH = 100
"""Lists and objects in each other in a body. Whatever else reads it, templates and encoders, takes more than that."""

_PREFER_WAIT = re.compile(r"\bwait=(\d{1,6})\b")


class Endpoints:
    """The routes' handlers."""

    def __init__(self, calls: Calls, jobs: Jobs) -> None:
        self._calls = calls
        self._jobs = jobs
        self.draining = False

    # ------------------------------------------------------------ generation

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        return await self._generate(CHAT, body, request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        return await self._generate(COMPLETIONS, body, request)

    async def _generate(self, endpoint: str, body: AnyRequest, request: Request) -> Response:
        if self.draining:
            raise Unavailable("this gateway is shutting down; another one can take the request", code="shutting_down")
        raw = await request.body()
        key = request.headers.get("idempotency-key", "")
        if len(key) > MAX_KEY_CHARACTERS:
            raise BadRequest(f"an Idempotency-Key may have at most {MAX_KEY_CHARACTERS} characters")
        caller = caller_of(request)
        if key and (earlier := await self._calls.earlier(key, caller)):
            if not earlier.jid:
                self._calls.admission.leave_inbound()
                return await self._calls.attach(body, endpoint, earlier, raw)
            if await self._jobs.knows(earlier):
                return json_response(await self._jobs.repeated(earlier, endpoint, raw, caller), 202)
        answer = self._answer(endpoint, body, (key, raw), caller)
        stream = bool(body.stream) and not body.background
        return KeepAliveResponse(answer, stream=stream, keepalive_s=self._calls.settings.keepalive_s)

    async def _answer(self, endpoint: str, body: AnyRequest, sent: tuple[str, bytes], caller: Caller) -> Response:
        """Answer a call that was `sent` with an Idempotency-Key, or "", and these bytes."""
        key, raw = sent
        prepared = await self._calls.prepare(body, caller)
        if prepared.options.background:
            idem = (key, body_hash(endpoint, raw)) if key else ("", "")
            return json_response(await self._jobs.create(prepared, endpoint, raw, idem), 202)
        return await self._calls.answer(prepared, endpoint, key, raw)

    # ------------------------------------------------------------ models

    async def models(self, request: Request) -> Response:
        base = await self._calls.fleet.require(worker=False)
        return json_response({"object": "list", "data": await self._calls.resolver.models(base, caller_of(request))})

    async def model(self, name: str, request: Request) -> Response:
        base = await self._calls.fleet.require(worker=False)
        return json_response(await self._calls.resolver.model(name, base, caller_of(request)))

    # ------------------------------------------------------------ jobs

    async def jobs(
        self,
        request: Request,
        status: JobStatus | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> Response:
        return json_response(await self._jobs.list(caller_of(request), status, limit, after))

    async def job(self, jid: str, request: Request) -> Response:
        # A gateway that ends must not be waited for.
        wait = None if self.draining else _PREFER_WAIT.search(request.headers.get("prefer", ""))
        return json_response(await self._jobs.get(jid, caller_of(request), float(wait[1]) if wait else 0.0))

    async def cancel_job(self, jid: str, request: Request) -> Response:
        return json_response(await self._jobs.cancel(jid, caller_of(request)))

    # ------------------------------------------------------------ operation

    async def health(self) -> Response:
        fleet = self._calls.fleet
        await fleet.refresh()
        ready = fleet.is_ready and not self.draining
        state = "draining" if self.draining else "ready" if ready else "no_worker"
        body = {"status": state, "workers": fleet.num_workers}
        if ready:
            return json_response(body)
        return json_response({**body, "error": "unhealthy", "error_type": "healthcheck"}, 503)


class _JsonRequest(Request):
    """Parses bodies with orjson, which refuses what is not JSON (NaN) or no text (lone surrogates)."""

    async def json(self) -> Any:
        raw = await self.body()
        value = orjson.loads(raw)
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
            raise HTTPException(400, f"the body is nested too deeply; the limit is {MAX_DEPTH} levels")
        return value


def _is_deeper(value: Any, limit: int) -> bool:
    """Tell whether lists and objects lie in each other more than `limit` deep."""
    level = [value]
    for _ in range(limit):
        level = [
            inner for outer in level if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]  # fmt: skip
        if not level:
            return False
    return True


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    """Bind paths to handlers."""
    app.router.route_class = JsonRoute
    app.post(CHAT, responses=openapi.GENERATED)(endpoints.chat)
    app.post(COMPLETIONS, responses=openapi.GENERATED)(endpoints.completions)
    app.get("/v1/models", responses=openapi.PAGE)(endpoints.models)
    app.get("/v1/models/{name:path}")(endpoints.model)
    app.get("/v1/jobs", responses=openapi.PAGE)(endpoints.jobs)
    app.get("/v1/jobs/{jid}", responses=openapi.JOB)(endpoints.job)
    app.post("/v1/jobs/{jid}/cancel", responses=openapi.JOB)(endpoints.cancel_job)


def json_response(value: Any, status: int = 200) -> Response:
    """Return a value as a JSON answer."""
    return Response(orjson.dumps(value), status, media_type="application/json")
