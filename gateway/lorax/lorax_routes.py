"""LoRAX's native routes."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from gateway.adapters.residency import look
from gateway.answers.respond import Answers, sent_of
from gateway.auth.callers import Caller, caller_of
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.calls import lorax_metrics, observe
from gateway.calls.follow import Generation
from gateway.calls.parsed_call import Sent
from gateway.calls.pipeline import Pipeline
from gateway.http import openapi
from gateway.http.access import ADMIN_PAGE, CALL, INFER, Routes
from gateway.http.paths import INVOCATIONS
from gateway.lorax.lorax_bodies import CompatRequest, GenerateRequest, InvocationRequest, Parameters, StreamRequest
from gateway.lorax.lorax_errors import LORAX_ERRORS
from gateway.lorax.lorax_parse import NativeCall, parse
from gateway.lorax.lorax_write import NativeAnswer
from gateway.openai.openai_bodies import ChatRequest, CompletionRequest
from gateway.openai.openai_routes import OpenAIEndpoints
from protocol.metrics.fleet import RESIDENCY
from protocol.metrics.pages import page
from protocol.metrics.series import LORAX_BATCH_SIZE, LORAX_QUEUE_LENGTH
from protocol.wire.messages import Task

VERSION = "0.1.0"
"""The version that every LoRAX server reports; clients compare it."""

PIPELINES: dict[Task, str] = {
    "generate": "text-generation",
    "embed": "feature-extraction",
    "classify": "token-classification",
    "score": "text-classification",
}
"""Task of a base model -> the Hub's pipeline tag."""

PROBE = "Where should Johnny live?"
MAX_LISTED = 1000

Encode = Callable[[str, Task, Caller], Awaitable[Generation]]
"""Starts a call to an encoder, given a text, the base model's task, and the caller."""


class NativeEndpoints:
    """The native routes' handlers."""

    def __init__(self, answers: Answers, pipeline: Pipeline, openai: OpenAIEndpoints, encode: Encode) -> None:
        """openai: answers OpenAI's bodies at `/invocations`. encode: starts a call to an encoder."""
        self._answers = answers
        self._pipeline = pipeline
        self._openai = openai
        self._encode = encode

    # ------------------------------------------------------------ generation

    async def compat(self, body: CompatRequest, request: Request) -> Response:
        """Answer `POST /`."""
        return await self._generate(body, request, stream=body.stream, as_list=not body.stream)

    async def invoke(self, body: InvocationRequest, request: Request) -> Response:
        """Answer `/invocations`, in LoRAX's or OpenAI's form."""
        if isinstance(body, ChatRequest):
            return await self._openai.chat(body, request)
        if isinstance(body, CompletionRequest):
            return await self._openai.completions(body, request)
        return await self.compat(body, request)

    async def generate(self, body: GenerateRequest, request: Request) -> Response:
        """Answer `/generate`."""
        return await self._generate(body, request, stream=False)

    async def generate_stream(self, body: StreamRequest, request: Request) -> Response:
        """Answer `/generate_stream`."""
        return await self._generate(body, request, stream=True)

    async def _generate(
        self, body: GenerateRequest, request: Request, *, stream: bool, as_list: bool = False
    ) -> Response:
        started_s, settings = time.monotonic(), self._pipeline.settings
        sent = await sent_of(request.scope["path"], request)

        async def answer() -> NativeAnswer:
            caller = caller_of(request)
            make = partial(parse, body, caller, settings, sent, stream=stream, as_list=as_list)
            native = await self._pipeline.parsed(body, caller, len(sent.raw), make)
            return await self._answer(native, started_s)

        return await self._answers.respond(answer(), stream=stream, errors=LORAX_ERRORS)

    async def _answer(self, native: NativeCall, started_s: float) -> NativeAnswer:
        generation = await self._pipeline.run_once(native.call)
        return NativeAnswer(generation, native, started_s)

    # ------------------------------------------------------------ operation

    async def info(self, request: Request) -> Response:
        """Answer `/info`."""
        pipeline, settings = self._pipeline, self._pipeline.settings
        base = await pipeline.fleet.require(worker=False)
        served = await pipeline.resolver.catalogue.served(caller_of(request))
        served = [alias for alias in served if pipeline.resolver.is_of(alias, base)]
        return json_response(
            {
                "model_id": base.name,
                "model_sha": None,
                "model_dtype": f"torch.{base.dtype}",
                "model_device_type": base.device,
                "model_pipeline_tag": PIPELINES[base.task],
                "max_concurrent_requests": settings.max_queued,
                "max_best_of": settings.max_choices,
                "max_stop_sequences": settings.max_stop_strings,
                "max_input_length": base.max_model_len - (base.task == "generate"),
                "max_total_tokens": base.max_model_len,
                # Batches are limited by blocks and step tokens, see docs/engine.md.
                "waiting_served_ratio": 0.0,
                "max_batch_total_tokens": None,
                "max_waiting_tokens": 0,
                "validation_workers": 1,
                "eager_prefill": True,
                "version": VERSION,
                "sha": None,
                "docker_label": None,
                "request_logger_url": None,
                "num_adapters": len(served),
                "adapters": [alias.name for alias in served[:MAX_LISTED]],
                "workers": pipeline.fleet.num_workers,
            }
        )

    async def startup(self, request: Request) -> Response:
        """Generate one token, embed or classify a text, as LoRAX's health check does."""
        caller = caller_of(request)
        base = await self._pipeline.fleet.require(worker=True)
        if base.task == "score" and not base.labels:
            return Response()  # only adapters have heads
        if base.task != "generate":
            generation = await self._encode(PROBE, base.task, caller)
        else:
            body = GenerateRequest(inputs=PROBE, parameters=Parameters(max_new_tokens=1))
            call = parse(body, caller, self._pipeline.settings, Sent("/startup", b""), stream=False)
            generation = (await self._answer(call, time.monotonic())).generation
        if not await _makes_output(generation):
            return json_response({"error": "Empty generation", "error_type": "failed healthcheck"}, 500)
        return Response()

    async def metrics(self, request: Request) -> Response:
        """Answer `/metrics`."""
        fleet = self._pipeline.fleet
        beats = await fleet.show_workers()
        if self._pipeline.settings.vllm_metrics and self._pipeline.settings.metrics_named:
            RESIDENCY.seen = await look(self._pipeline.bus, fleet, beats, observe.name_of_digest)
        LORAX_QUEUE_LENGTH.set(fleet.num_queued)
        LORAX_BATCH_SIZE.set(fleet.num_running)
        accept = request.headers.get("accept", "")
        if "application/json" in accept:
            return json_response(await run_in_threadpool(lorax_metrics.as_json))
        text, media_type = await run_in_threadpool(page, accept)
        return Response(text, media_type=media_type)


async def _makes_output(generation: Generation) -> bool:
    """Follow a call to its end without a client; return whether it had output."""
    try:
        while not generation.is_done:
            await generation.advance(1.0)
    finally:
        await generation.close()
    return any(choice.cursor.next for choice in generation.choices)


def add_native_routes(app: FastAPI, native: NativeEndpoints) -> None:
    """Bind LoRAX's paths to handlers."""
    routes = Routes(app, JsonRoute)
    errors, streamed = openapi.NATIVE, {**openapi.NATIVE, **openapi.STREAMED}
    routes.post("/", CALL, responses=streamed)(native.compat)
    routes.post(INVOCATIONS, CALL, responses={**streamed, **openapi.EITHER})(native.invoke)
    routes.post("/generate", CALL, responses=errors)(native.generate)
    routes.post("/generate_stream", CALL, responses=streamed, response_class=openapi.EventStream)(
        native.generate_stream
    )
    routes.get("/info", INFER, responses=errors)(native.info)
    routes.get("/startup", INFER, responses=errors, response_class=Response)(native.startup)
    routes.get("/metrics", ADMIN_PAGE, responses=openapi.METRICS)(native.metrics)
