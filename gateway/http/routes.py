"""OpenAI's routes, jobs and health: each handler reads its request, and returns the answer as a response."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.adapters.resolver import is_base
from gateway.anthropic.models import DEFAULT_LIMIT, MAX_LIMIT, page, shown
from gateway.auth.callers import caller_of
from gateway.bodies.fields import REQUEST_ID
from gateway.bodies.json_bodies import JsonRoute, json_answer, json_response
from gateway.calls.jobs import JobStatus
from gateway.calls.parse import Sent
from gateway.calls.pipeline import Pipeline
from gateway.calls.writers import SSE, Framing
from gateway.http import openapi
from gateway.http.access import ADMIN_PAGE, CALL, INFER, OPEN, Routes
from gateway.http.errors import OPENAI_ERRORS, ErrorShape
from gateway.http.keep_alive import KeepAliveResponse
from gateway.http.paths import CHAT, COMPLETIONS, FLEET, MODELS, PING
from gateway.http.shapes import speaks_anthropic
from gateway.openai.bodies import AnyRequest, ChatRequest, CompletionRequest
from gateway.openai.calls import OpenAICalls
from gateway.overload.admission import Admission
from protocol.runtime.release import RELEASE
from protocol.wire.errors import BadRequest, ModelNotFound, NotFound, Unavailable
from protocol.wire.messages import SchedulerStatus, ServedModel

MAX_KEY_CHARACTERS = 255

_PREFER_WAIT = re.compile(r"\bwait=(\d{1,6})\b")


class Endpoints:
    """The handlers of OpenAI's routes, jobs and health."""

    def __init__(self, pipeline: Pipeline, admission: Admission, disk_full: Callable[[], bool]) -> None:
        """disk_full: tells whether the queue's server cannot write to its disk."""
        self._pipeline = pipeline
        self._admission = admission
        self._disk_full = disk_full
        self.calls = OpenAICalls(pipeline)
        self._jobs = self.calls.jobs
        self.draining = False

    async def respond(
        self, answer: Coroutine[Any, Any, Response], *, stream: bool = False, errors: ErrorShape = OPENAI_ERRORS,
        framing: Framing = SSE,
    ) -> Response:  # fmt: skip
        """Return the response that a call comes to, kept alive until then. Raises Unavailable while draining."""
        if self.draining:
            answer.close()
            raise Unavailable("this gateway is shutting down; another one can take the request", code="shutting_down")
        keepalive_s = self._pipeline.settings.keepalive_s
        return KeepAliveResponse(answer, stream=stream, keepalive_s=keepalive_s, errors=errors, framing=framing)

    # ------------------------------------------------------------ generation

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer `/v1/chat/completions`."""
        return await self._generate(CHAT, body, request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Answer `/v1/completions`."""
        return await self._generate(COMPLETIONS, body, request)

    async def _generate(self, endpoint: str, body: AnyRequest, request: Request) -> Response:
        sent = await sent_of(endpoint, request)
        stream = bool(body.stream) and not body.background
        return await self.respond(self.calls.answer(body, sent, caller_of(request)), stream=stream)

    # ------------------------------------------------------------ models

    async def models(
        self,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT,
        after_id: str | None = None,
        before_id: str | None = None,
        lifecycle: Annotated[list[str] | None, Query(alias="lifecycle[]")] = None,
    ) -> Response:
        """Answer `/v1/models`: OpenAI's list whole, or a page of Anthropic's, which the parameters are for."""
        base = await self._pipeline.fleet.require(worker=False)
        if speaks_anthropic(request.scope):
            served = await self._pipeline.resolver.catalogue.served(caller_of(request))
            return json_response(page(base, served, limit, after_id, before_id, lifecycle))
        models = await self._pipeline.resolver.models(base, caller_of(request))
        return json_response({"object": "list", "data": orjson.Fragment(models)})

    async def model(self, name: str, request: Request) -> Response:
        """Answer `/v1/models/{name}`."""
        if not name:
            raise NotFound(f"{MODELS}/ lacks the name of a model; GET {MODELS} lists them", code="unknown_url")
        base = await self._pipeline.fleet.require(worker=False)
        resolver, caller = self._pipeline.resolver, caller_of(request)
        if not speaks_anthropic(request.scope):
            return json_response(await resolver.model(name, base, caller))
        if is_base(name, base):
            return json_response(shown(base, None))
        alias = await resolver.known(name, caller)
        if alias is None or alias.state != "on_disk":
            raise ModelNotFound(name)
        return json_response(shown(base, alias))

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
        # A draining gateway lets nobody wait.
        wait = None if self.draining else _PREFER_WAIT.search(request.headers.get("prefer", ""))
        return json_answer(await self._jobs.get(jid, caller_of(request), float(wait[1]) if wait else 0.0))

    async def stream_job(self, jid: str, request: Request) -> Response:
        """Answer `/v1/jobs/{jid}/stream`."""
        return await self._jobs.stream(jid, caller_of(request), request.headers.get("last-event-id", ""))

    async def cancel_job(self, jid: str, request: Request) -> Response:
        """Answer `/v1/jobs/{jid}/cancel`."""
        return json_answer(await self._jobs.cancel(jid, caller_of(request)))

    async def delete_job(self, jid: str, request: Request) -> Response:
        """Answer `DELETE /v1/jobs/{jid}`."""
        return json_response(await self._jobs.delete(jid, caller_of(request)))

    # ------------------------------------------------------------ operation

    async def health(self) -> Response:
        """Answer `/health`: 200 while requests are served, 503 otherwise."""
        fleet = self._pipeline.fleet
        await fleet.refresh()
        disk_full = self._disk_full()  # then beats of workers cannot be written either
        ready = fleet.is_ready and not self.draining and not disk_full
        waits = "queue_disk_full" if disk_full else "no_worker"
        state = "draining" if self.draining else "ready" if ready else waits
        body = {"status": state, "workers": fleet.num_workers}
        if ready:
            return json_response(body)
        return json_response({**body, "error": "unhealthy", "error_type": "healthcheck"}, 503)

    async def fleet(self) -> Response:
        """Answer `/v1/fleet`: what a program asks that starts and stops workers."""
        fleet = self._pipeline.fleet
        await fleet.refresh()
        status = fleet.status
        queued, running = (status.queued, status.running) if status is not None else (0, 0)
        drain_next = status.drain_next or None if status is not None else None
        found = {"workers": fleet.num_workers, "queued": queued, "running": running, "demand": fleet.demand}
        base = fleet.base.name if fleet.base is not None else None
        more = {"drain_next": drain_next, "model": base, "queue": _queue(status), "compute": _compute(fleet.base)}
        return json_response({"object": "fleet", **found, **more})

    async def version(self) -> Response:
        """Answer vLLM's `/version`."""
        return json_response({"version": RELEASE})

    async def load(self) -> Response:
        """Answer vLLM's `/load`."""
        return json_response({"server_load": self._admission.num_in_flight})


def _compute(base: ServedModel | None) -> dict[str, str | None] | None:
    """Return in what numbers, by which kernels and why workers compute; None before there was a worker."""
    if base is None:
        return None
    return {"dtype": base.dtype, "reason": base.dtype_reason or None, "kernels": base.kernels or None}


def _queue(status: SchedulerStatus | None) -> dict[str, Any] | None:
    """Return what the leading scheduler says of the queue, None without one."""
    if status is None:
        return None
    return {
        "batch": status.queued_batch, "tokens": status.queued_tokens, "drain_rate": status.drain_rate,
        "oldest_ms": {cls: ms or None for cls, ms in status.oldest_ms.items()}, "dead_letters": status.dead_letters,
        "used_bytes": status.used_bytes, "max_bytes": status.max_bytes, "leader": status.leader,
        "sent_ms": status.sent_ms,
    }  # fmt: skip


async def sent_of(endpoint: str, request: Request) -> Sent:
    """Return a body as it came. Raises BadRequest for an Idempotency-Key that is too long."""
    headers = request.headers
    key, request_id = headers.get("idempotency-key", ""), headers.get("x-request-id", "")
    if len(key) > MAX_KEY_CHARACTERS:
        raise BadRequest(f"an Idempotency-Key may have at most {MAX_KEY_CHARACTERS} characters")
    return Sent(endpoint, await request.body(), key, request_id if REQUEST_ID.fullmatch(request_id) else "")


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    routes.post(CHAT, CALL, responses=openapi.GENERATED)(endpoints.chat)
    routes.post(COMPLETIONS, CALL, responses=openapi.GENERATED)(endpoints.completions)
    routes.get(MODELS, INFER, responses=openapi.MODELS)(endpoints.models)
    routes.get(MODELS + "/{name:path}", INFER)(endpoints.model)
    routes.get("/v1/jobs", INFER, responses=openapi.PAGE)(endpoints.jobs)
    routes.get("/v1/jobs/{jid}", INFER, responses=openapi.JOB)(endpoints.job)
    routes.get("/v1/jobs/{jid}/stream", INFER, responses=openapi.STREAMED)(endpoints.stream_job)
    routes.delete("/v1/jobs/{jid}", INFER, responses=openapi.DELETED)(endpoints.delete_job)
    routes.post("/v1/jobs/{jid}/cancel", INFER, responses=openapi.JOB)(endpoints.cancel_job)
    routes.get(FLEET, ADMIN_PAGE, responses=openapi.FLEET)(endpoints.fleet)
    routes.get("/version", INFER, responses=openapi.VERSION)(endpoints.version)
    routes.get("/load", ADMIN_PAGE, responses=openapi.LOAD)(endpoints.load)
    for path in ("/", PING, "/health"):
        routes.get(path, OPEN, responses=openapi.HEALTH)(endpoints.health)
        routes.head(path, OPEN, include_in_schema=False)(endpoints.health)
    routes.post(PING, OPEN, responses=openapi.HEALTH)(endpoints.health)  # as SageMaker and vLLM have it
