"""LoRAX's native routes. `/health` is also ours."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from gateway.adapters.residency import look
from gateway.auth.callers import caller_of
from gateway.bodies.json_bodies import JsonRoute, json_response
from gateway.calls import observe
from gateway.calls.follow import Generation
from gateway.calls.parse import Sent
from gateway.calls.pipeline import Pipeline
from gateway.encoders.bodies import EncoderRequest
from gateway.encoders.calls import EncoderCalls
from gateway.http import openapi
from gateway.http.paths import INVOCATIONS, PING
from gateway.http.routes import Endpoints, sent_of
from gateway.lorax import metrics as lorax_metrics
from gateway.lorax.bodies import CompatRequest, GenerateRequest, InvocationRequest, Parameters, StreamRequest
from gateway.lorax.errors import LORAX_ERRORS
from gateway.lorax.parse import NativeCall, parse
from gateway.lorax.write import NativeResponse
from gateway.openai.bodies import ChatRequest, CompletionRequest
from protocol.metrics.fleet import RESIDENCY
from protocol.metrics.pages import page
from protocol.metrics.series import LORAX_BATCH_SIZE, LORAX_QUEUE_LENGTH
from protocol.wire.messages import Task

VERSION = "0.1.0"
"""The version that every LoRAX reports; clients compare it."""

PIPELINES: dict[Task, str] = {
    "generate": "text-generation", "embed": "feature-extraction", "classify": "token-classification",
    "score": "text-classification",
}  # fmt: skip
"""The Hub's names of what base models do."""

PROBE = "Where should Johnny live?"
MAX_LISTED = 1000


class NativeEndpoints:
    """The native routes' handlers."""

    def __init__(self, endpoints: Endpoints, pipeline: Pipeline) -> None:
        self.endpoints = endpoints
        self._pipeline = pipeline
        self._encoders = EncoderCalls(pipeline, endpoints.calls.jobs)

    # ------------------------------------------------------------ generation

    async def compat(self, body: CompatRequest, request: Request) -> Response:
        """Answer `POST /`."""
        return await self._generate(body, request, stream=body.stream, as_list=not body.stream)

    async def invoke(self, body: InvocationRequest, request: Request) -> Response:
        """Answer `/invocations`, in LoRAX's way or OpenAI's."""
        if isinstance(body, ChatRequest):
            return await self.endpoints.chat(body, request)
        if isinstance(body, CompletionRequest):
            return await self.endpoints.completions(body, request)
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
        sent = await sent_of(request.url.path, request)

        async def answer() -> Response:
            native = parse(body, caller_of(request), settings, sent, stream=stream, as_list=as_list)
            return await self._answer(native, started_s)

        return await self.endpoints.respond(answer(), stream=stream, errors=LORAX_ERRORS)

    async def _answer(self, native: NativeCall, started_s: float) -> NativeResponse:
        generation = await self._pipeline.run_once(native.call)
        return NativeResponse(generation, native, started_s, self._pipeline.settings.keepalive_s)

    # ------------------------------------------------------------ operation

    async def info(self, request: Request) -> Response:
        """Answer `/info`."""
        pipeline, settings = self._pipeline, self._pipeline.settings
        base = await pipeline.fleet.require(worker=False)
        async with pipeline.resolver.catalogue.visible(caller_of(request)) as aliases:
            adapters = [alias.name for alias in aliases if alias.state == "on_disk"]
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
                # Here blocks and step tokens limit batches, see docs/engine.md.
                "waiting_served_ratio": 0.0,
                "max_batch_total_tokens": None,
                "max_waiting_tokens": 0,
                "validation_workers": 1,
                "eager_prefill": True,
                "version": VERSION,
                "sha": None,
                "docker_label": None,
                "request_logger_url": None,
                "num_adapters": len(adapters),
                "adapters": adapters[:MAX_LISTED],
                "workers": pipeline.fleet.num_workers,
            }
        )

    async def startup(self, request: Request) -> Response:
        """Generate one token, embed or classify a text, as LoRAX's probe does."""
        caller, now_s = caller_of(request), time.monotonic()
        base = await self._pipeline.fleet.require(worker=True)
        if base.task == "embed":
            answer = await self._encoders.embed(EncoderRequest(inputs=PROBE), None, caller)
        elif base.task == "score" and not base.labels:
            return Response()  # only adapters have heads
        elif base.task in ("classify", "score"):
            answer = await self._encoders.classify(EncoderRequest(inputs=PROBE), None, caller, now_s)
        else:
            body = GenerateRequest(inputs=PROBE, parameters=Parameters(max_new_tokens=1))
            answer = await self._answer(
                parse(body, caller, self._pipeline.settings, Sent("/startup", b""), stream=False), now_s
            )
        if not await _makes_output(answer.generation):
            return json_response({"error": "Empty generation", "error_type": "failed healthcheck"}, 500)
        return Response()

    async def metrics(self, request: Request) -> Response:
        """Answer `/metrics`."""
        fleet = self._pipeline.fleet
        beats = await fleet.show_workers()
        if self._pipeline.settings.vllm_metrics and self._pipeline.settings.metrics_named:
            RESIDENCY.seen = await look(self._pipeline.bus, fleet, beats, observe.name_of_digest)
        LORAX_QUEUE_LENGTH.set(fleet.status.queued if fleet.status else 0)
        LORAX_BATCH_SIZE.set(fleet.status.running if fleet.status else 0)
        accept = request.headers.get("accept", "")
        if "application/json" in accept:
            return json_response(await run_in_threadpool(lorax_metrics.as_json))
        text, media_type = await run_in_threadpool(page, accept)
        return Response(text, media_type=media_type)


async def _makes_output(generation: Generation) -> bool:
    """Follow a call to its end without a client; return whether anything came out."""
    try:
        while not generation.is_done:
            await generation.advance(1.0)
    finally:
        await generation.close()
    return any(choice.cursor.next for choice in generation.choices)


def add_native_routes(app: FastAPI, native: NativeEndpoints) -> None:
    """Bind LoRAX's paths to handlers."""
    app.router.route_class = JsonRoute
    errors, streamed = openapi.NATIVE, {**openapi.NATIVE, **openapi.STREAMED}
    app.post("/", responses=streamed)(native.compat)
    app.post(INVOCATIONS, responses=streamed)(native.invoke)
    app.post("/generate", responses=errors)(native.generate)
    app.post("/generate_stream", responses=streamed, response_class=openapi.EventStream)(native.generate_stream)
    app.get("/info", responses=errors)(native.info)
    app.get("/startup", responses=errors, response_class=Response)(native.startup)
    app.get("/metrics", responses=openapi.METRICS)(native.metrics)
    for path in ("/", PING, "/health"):
        app.get(path, responses=openapi.HEALTH)(native.endpoints.health)
        app.head(path, include_in_schema=False)(native.endpoints.health)
    app.post(PING, responses=openapi.HEALTH)(native.endpoints.health)  # as SageMaker and vLLM have it
