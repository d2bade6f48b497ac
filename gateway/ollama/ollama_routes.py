"""Ollama's routes: `/api/chat`, `/api/generate`, `/api/embed`, and those about models."""

from __future__ import annotations

import time
from collections.abc import Set
from functools import partial

import msgspec
import orjson
from fastapi import FastAPI, Request
from starlette.responses import Response

from gateway.answers.call_response import CallResult
from gateway.answers.respond import Answers, sent_of
from gateway.auth.callers import Caller, caller_of
from gateway.bodies.fields import BASE
from gateway.bodies.json_bodies import AnyTypeRoute, json_response
from gateway.calls.follow import Generation
from gateway.calls.parsed_call import Models, ParsedCall, Sent
from gateway.calls.pipeline import Pipeline
from gateway.http import openapi
from gateway.http.access import CALL, INFER, Routes
from gateway.http.paths import OLLAMA_CHAT, OLLAMA_EMBED, OLLAMA_GENERATE
from gateway.ollama import ollama_models
from gateway.ollama.ollama_bodies import EmbedRequest, OllamaChatRequest, OllamaGenerateRequest, ShowRequest
from gateway.ollama.ollama_errors import OLLAMA_ERRORS
from gateway.ollama.ollama_models import Known
from gateway.ollama.ollama_parse import parse, parse_embed, plain_name
from gateway.ollama.ollama_write import EmbedAnswer, Objects, OllamaAnswer
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, ModelNotFound

VERSION = "0.12.11"
"""The version of Ollama whose API this is, the first with logprobs; clients refuse older ones."""


class OllamaEndpoints:
    """The routes' handlers."""

    def __init__(self, answers: Answers, pipeline: Pipeline) -> None:
        self._answers = answers
        self._pipeline = pipeline

    # ------------------------------------------------------------ generation

    async def chat(self, body: OllamaChatRequest, request: Request) -> Response:
        """Answer `/api/chat`."""
        return await self._generate(body, request)

    async def generate(self, body: OllamaGenerateRequest, request: Request) -> Response:
        """Answer `/api/generate`."""
        return await self._generate(body, request)

    async def _generate(self, body: OllamaChatRequest | OllamaGenerateRequest, request: Request) -> Response:
        started_s, caller, sent = time.monotonic(), caller_of(request), await sent_of(request.scope["path"], request)
        objects = Objects(body.model, isinstance(body, OllamaChatRequest))

        async def answer() -> CallResult:
            if body.is_empty:
                await self._require(body.model, caller)
                return json_response(objects.loaded())
            make = partial(parse, body, caller, self._pipeline.settings)
            generation = await self._run(await self._pipeline.parsed(body, caller, len(sent.raw), make), sent)
            return OllamaAnswer(generation, objects, started_s)

        stream = body.streams and not body.is_empty
        return await self._answers.respond(answer(), stream=stream, errors=OLLAMA_ERRORS, framing=objects.framing())

    async def embed(self, body: EmbedRequest, request: Request) -> Response:
        """Answer `/api/embed`."""
        started_s, caller, settings = time.monotonic(), caller_of(request), self._pipeline.settings
        sent = await sent_of(request.scope["path"], request)

        async def answer() -> CallResult:
            make = partial(parse_embed, body, caller, settings)
            generation = await self._run(await self._pipeline.parsed(body, caller, len(sent.raw), make), sent)
            return EmbedAnswer(generation, body, started_s)

        return await self._answers.respond(answer(), errors=OLLAMA_ERRORS)

    async def _run(self, call: ParsedCall, sent: Sent) -> Generation:
        """Run a call, or attach to the earlier call with its Idempotency-Key. Raises as `Pipeline.run_once`."""
        return await self._pipeline.run_once(msgspec.structs.replace(call, sent=sent) if sent.key else call)

    async def _require(self, name: str, caller: Caller) -> None:
        """Wait until a model can be used. Raises as `CallResolver.targets`."""
        models, resolver = Models([plain_name(name)]), self._pipeline.call_resolver
        await resolver.targets(models, await resolver.base_of(models, caller, worker=True), caller)

    # ------------------------------------------------------------ models

    async def tags(self, request: Request) -> Response:
        """Answer `/api/tags`."""
        base = await self._pipeline.fleet.require(worker=False)
        resolver = self._pipeline.resolver
        listed = await resolver.catalogue.listed(
            caller_of(request),
            ("tags", m.encode(base)),
            [ollama_models.listed(base, None)],
            lambda alias, record: (
                ollama_models.listed(base, (alias, record))
                if record and alias.state == "on_disk" and resolver.is_of(alias, base)
                else None
            ),
        )
        return json_response({"models": orjson.Fragment(listed)})

    async def ps(self, request: Request) -> Response:
        """Answer `/api/ps`. Only operators see adapters, because all tenants' use determines which are resident."""
        base, caller = await self._pipeline.fleet.require(worker=False), caller_of(request)
        beats = [beat for beat in (await self._pipeline.bus.members.worker_beats()).values() if beat is not None]
        resident = {digest for beat in beats for digest in beat.resident}
        known = await self._known(caller, resident) if caller.is_admin else []
        return json_response({"models": ollama_models.running(base, known, beats)})

    async def show(self, body: ShowRequest, request: Request) -> Response:
        """Answer `/api/show`."""
        asked = body.model or body.name
        if asked is None:
            raise BadRequest("model: it is missing", param="model")
        pipeline, caller, name = self._pipeline, caller_of(request), plain_name(asked)
        await pipeline.fleet.require_any(worker=False)
        models, resolver = Models([name]), pipeline.call_resolver
        is_base = name in (BASE, *(base.name for base in pipeline.fleet.bases))
        alias = None if is_base else await pipeline.resolver.known(name, caller)
        if not is_base and (alias is None or alias.state != "on_disk"):
            raise ModelNotFound(asked)
        base = await resolver.base_of(models, caller, worker=False)
        [target] = await resolver.targets(models, base, caller)
        if alias is None:
            return json_response(ollama_models.shown(base, None, target.files))
        records = await pipeline.bus.adapters.records([alias.digest])
        if alias.digest not in records:
            raise ModelNotFound(asked)
        return json_response(ollama_models.shown(base, (alias, records[alias.digest]), target.files))

    async def version(self) -> Response:
        """Answer `/api/version`."""
        return json_response({"version": VERSION})

    async def _known(self, caller: Caller, digests: Set[str]) -> list[Known]:
        """Return the served adapters among these digests that a caller sees, by name."""
        catalogue = self._pipeline.resolver.catalogue
        served = [alias for alias in await catalogue.served(caller) if alias.digest in digests]
        return [(alias, record) async for alias, record in catalogue.records(served) if record is not None]


def add_ollama_routes(app: FastAPI, ollama: OllamaEndpoints) -> None:
    """Bind paths to handlers."""
    routes = Routes(app, AnyTypeRoute)
    routes.post(OLLAMA_CHAT, CALL, responses=openapi.OLLAMA_GENERATED)(ollama.chat)
    routes.post(OLLAMA_GENERATE, CALL, responses=openapi.OLLAMA_GENERATED)(ollama.generate)
    routes.post(OLLAMA_EMBED, CALL, responses=openapi.OLLAMA)(ollama.embed)
    routes.post("/api/show", INFER, responses=openapi.OLLAMA)(ollama.show)
    routes.get("/api/tags", INFER, responses=openapi.OLLAMA_MODELS)(ollama.tags)
    routes.get("/api/ps", INFER, responses=openapi.OLLAMA_MODELS)(ollama.ps)
    routes.get("/api/version", INFER, responses={**openapi.OLLAMA, **openapi.VERSION})(ollama.version)
