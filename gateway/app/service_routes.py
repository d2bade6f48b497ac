"""The routes about the gateway as a whole: models, health, and the state of the fleet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from gateway.answers.respond import Answers
from gateway.anthropic.anthropic_models import DEFAULT_LIMIT, MAX_LIMIT, cut, page, shown
from gateway.app.shapes import speaks_anthropic
from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.calls.pipeline import Pipeline
from gateway.fleet.view import FleetView
from gateway.http import openapi
from gateway.http.access import ADMIN_PAGE, INFER, OPEN, Routes
from gateway.http.paths import CONSOLE, FLEET, MODELS, PING
from gateway.overload.admission import Admission
from protocol.runtime.release import RELEASE
from protocol.wire.errors import ModelNotFound, NotFound
from protocol.wire.messages import SchedulerStatus, ServedModel


class Endpoints:
    """The routes' handlers."""

    def __init__(
        self,
        answers: Answers,
        pipeline: Pipeline,
        admission: Admission,
        disk_full: Callable[[], bool],
        no_history: Callable[[], bool],
    ) -> None:
        """disk_full: whether the queue's server cannot write to its disk; no_history: whether its database is down."""
        self._answers = answers
        self._pipeline = pipeline
        self._admission = admission
        self._disk_full = disk_full
        self._no_history = no_history

    # ------------------------------------------------------------ models

    async def models(
        self,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT,
        after_id: str | None = None,
        before_id: str | None = None,
        lifecycle: Annotated[list[str] | None, Query(alias="lifecycle[]")] = None,
    ) -> Response:
        """Answer `/v1/models`: OpenAI's whole list, or a page in Anthropic's format, to which the parameters apply."""
        bases = await self._bases()
        if speaks_anthropic(request.scope):
            catalogue = self._pipeline.resolver.catalogue
            served = await catalogue.served(caller_of(request))
            shown_bases, aliases, has_more = cut(bases, served, limit, after_id, before_id, lifecycle)
            found = [shown(base, None) for base in shown_bases]
            async for one, record in catalogue.records(aliases):
                found.append(shown(self._pipeline.fleet.named(one.base) or bases[0], one, record))
            return json_response(page(found, has_more=has_more))
        models = await self._pipeline.resolver.models(bases, caller_of(request))
        return json_response({"object": "list", "data": orjson.Fragment(models)})

    async def model(self, name: str, request: Request) -> Response:
        """Answer `/v1/models/{name}`."""
        if not name:
            raise NotFound(f"{MODELS}/ lacks the name of a model; GET {MODELS} lists them", code="unknown_url")
        bases = await self._bases()
        resolver, caller = self._pipeline.resolver, caller_of(request)
        if not speaks_anthropic(request.scope):
            return json_response(await resolver.model(name, bases, caller))
        if (base := resolver.listed(name, bases)) is not None:
            return json_response(shown(base, None))
        alias = await resolver.known(name, caller)
        if alias is None or alias.state != "on_disk":
            raise ModelNotFound(name)
        records = await self._pipeline.bus.adapters.records([alias.digest])
        base = self._pipeline.fleet.named(alias.base) or bases[0]
        return json_response(shown(base, alias, records.get(alias.digest)))

    async def _bases(self) -> list[ServedModel]:
        """Return the listed bases, the default one first. Raises Unavailable while none is known."""
        fleet = self._pipeline.fleet
        await fleet.require_any(worker=False)
        return fleet.bases

    # ------------------------------------------------------------ operation

    async def health(self) -> Response:
        """Answer `/health`: 200 while requests are served, 503 otherwise."""
        fleet = self._pipeline.fleet
        await fleet.refresh()
        disk_full = self._disk_full()  # workers' heartbeats cannot be written either
        ready = fleet.is_ready and not self._answers.draining and not disk_full
        waits = "queue_disk_full" if disk_full else "no_worker"
        state = "draining" if self._answers.draining else "ready" if ready else waits
        body: dict[str, Any] = {"status": state, "workers": fleet.num_workers}
        if self._no_history():  # calls do not need it
            body["history"] = "unavailable"
        if ready:
            return json_response(body)
        return json_response({**body, "error": "unhealthy", "error_type": "healthcheck"}, 503)

    async def root(self, request: Request) -> Response:
        """Answer `/`: redirect a browser to the console, and report the health to other clients.

        The location is relative, so that it is correct behind a proxy that adds a prefix.
        """
        if "text/html" in request.headers.get("accept", ""):
            return Response(None, 307, {"location": f"{CONSOLE.removeprefix('/')}/", "vary": "accept"})
        return await self.health()

    async def fleet(self, request: Request) -> Response:
        """Answer `/v1/fleet`: the state of the fleet, for autoscalers.

        Why a base has not started may reveal local paths, so only admins see it.
        """
        fleet = self._pipeline.fleet
        await fleet.refresh()
        status = fleet.status
        queued, running = (status.queued, status.running) if status is not None else (0, 0)
        drain_next = status.drain_next or None if status is not None else None
        found = {"workers": fleet.num_workers, "queued": queued, "running": running, "demand": fleet.demand}
        base = fleet.base.name if fleet.base is not None else None
        more = {"drain_next": drain_next, "model": base, "queue": _queue(status), "compute": _compute(fleet.base)}
        if fleet.further:
            more["bases"] = [_shown_base(name, fleet) for name in fleet.names]
            is_told = caller_of(request).is_admin
            more["failed"] = fleet.failures if is_told else dict.fromkeys(fleet.failures, "")
            more["becoming"] = status.becoming if status is not None else {}
        return json_response({"object": "fleet", **found, **more})

    async def version(self) -> Response:
        """Answer vLLM's `/version`."""
        return json_response({"version": RELEASE})

    async def load(self) -> Response:
        """Answer vLLM's `/load`."""
        return json_response({"server_load": self._admission.num_in_flight})


def _shown_base(name: str, fleet: FleetView) -> dict[str, Any]:
    """Return the entry of one of several bases in `/v1/fleet`."""
    base, load = fleet.named(name), fleet.load(name)
    found: dict[str, Any] = {"name": name, "task": None, "fingerprint": None, "weights": None}
    if base is not None:
        found |= {"task": base.task, "fingerprint": base.fingerprint, "weights": base.weights or None}
    counts = {"workers": load.workers, "queued": load.queued, "running": load.running, "may_become": load.may_become}
    return {**found, **counts, "demand": fleet.demand_of(name)}


def _compute(base: ServedModel | None) -> dict[str, str | None] | None:
    """Return the workers' dtype with its reason, kernels and draft model; None without a worker."""
    if base is None:
        return None
    found = {"reason": base.dtype_reason, "kernels": base.kernels, "draft_model": base.draft_model}
    return {"dtype": base.dtype, **{name: value or None for name, value in found.items()}}


def _queue(status: SchedulerStatus | None) -> dict[str, Any] | None:
    """Return the state of the queue as the leading scheduler reports it, None without one."""
    if status is None:
        return None
    return {
        "batch": status.queued_batch,
        "tokens": status.queued_tokens,
        "drain_rate": status.drain_rate,
        "oldest_ms": {cls: ms or None for cls, ms in status.oldest_ms.items()},
        "dead_letters": status.dead_letters,
        "used_bytes": status.used_bytes,
        "max_bytes": status.max_bytes,
        "leader": status.leader,
        "sent_ms": status.sent_ms,
    }


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, JsonRoute)
    routes.get(MODELS, INFER, responses=openapi.MODELS)(endpoints.models)
    routes.get(MODELS + "/{name:path}", INFER)(endpoints.model)
    routes.get(FLEET, ADMIN_PAGE, responses=openapi.FLEET)(endpoints.fleet)
    routes.get("/version", INFER, responses=openapi.VERSION)(endpoints.version)
    routes.get("/load", ADMIN_PAGE, responses=openapi.LOAD)(endpoints.load)
    routes.get("/", OPEN, responses=openapi.HEALTH)(endpoints.root)
    routes.head("/", OPEN, include_in_schema=False)(endpoints.root)
    for path in (PING, "/health"):
        routes.get(path, OPEN, responses=openapi.HEALTH)(endpoints.health)
        routes.head(path, OPEN, include_in_schema=False)(endpoints.health)
    routes.post(PING, OPEN, responses=openapi.HEALTH)(endpoints.health)  # as SageMaker and vLLM do
