"""The ASGI application: the routes, and what wraps them.

From the outside in: envelope, browsers, CORS, admission, authentication, memory, large bodies, calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.adapters.operator_routes import OperatorEndpoints, add_operator_routes
from gateway.anthropic.routes import AnthropicEndpoints, add_anthropic_routes
from gateway.auth.authentication import Authentication
from gateway.auth.browsers import Browsers
from gateway.auth.callers import CALLER
from gateway.batches.calls import InnerCalls
from gateway.batches.routes import BatchEndpoints, add_batch_routes
from gateway.bodies.fields import REQUEST_ID
from gateway.bodies.parameter_check import IGNORED_HEADER
from gateway.books.audit_routes import AuditEndpoints, add_audit_routes
from gateway.books.usage_routes import UsageEndpoints, add_usage_routes
from gateway.calls import observe
from gateway.calls.trace import TRACE_OF, CallTrace
from gateway.console.routes import ConsolePages, add_console, docs_pages
from gateway.encoders.routes import EncoderEndpoints, add_encoder_routes
from gateway.files.routes import FileEndpoints, add_file_routes
from gateway.http import openapi
from gateway.http.direct import DirectCalls
from gateway.http.errors import REFUSALS_OF, REQUEST_ID_OF, add_handlers, is_failure
from gateway.http.headers import header_of
from gateway.http.paths import FILES, GENERATION_PATHS, LARGE_BODY_PATHS, SMALL_BODY_BYTES, UPLOAD
from gateway.http.routes import Endpoints, add_routes
from gateway.http.shapes import shape_of, speaks_anthropic
from gateway.http.sse import RAW_SEND
from gateway.lorax import metrics as lorax_metrics
from gateway.lorax.routes import NativeEndpoints, add_native_routes
from gateway.ollama.routes import OllamaEndpoints, add_ollama_routes
from gateway.operators.routes import FleetEndpoints, add_fleet_routes
from gateway.overload.admission import Admission
from gateway.overload.large import LargeBodies
from gateway.overload.memory import Charged, MemoryAccount
from gateway.requests.routes import RequestEndpoints, add_request_routes
from gateway.responses.conversation_routes import ConversationEndpoints, add_conversation_routes
from gateway.responses.routes import ResponseEndpoints, add_response_routes
from gateway.tokenizer.routes import TokenizerEndpoints, add_tokenizer_routes
from gateway.webhooks.routes import WebhookRoutes, add_webhook_routes
from protocol.metrics.series import HTTP_REQUESTS, HTTP_REQUESTS_OPEN
from protocol.queue.books.api_keys import ApiKeys
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.settings import Settings, names_of
from protocol.runtime.tracing import TRACE_ID, TRACING
from protocol.wire.errors import Internal, Overloaded, Unavailable

logger = logging.getLogger(__name__)


DISCARDED_BODIES = 8
"""Multiple of the limit up to which a too large body is read and discarded, so that its client reads the error."""

EXPOSED_HEADERS = (
    "x-request-id", "request-id", "x-trace-id", "openai-processing-ms", "retry-after", "x-should-retry", IGNORED_HEADER,
    *(f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset") for what in ("requests", "tokens")),
    *(f"anthropic-ratelimit-{what}-{part}" for what in ("requests", "tokens")
      for part in ("limit", "remaining", "reset")),
)  # fmt: skip


def build_app(
    endpoints: Endpoints,
    native: NativeEndpoints,
    operators: OperatorEndpoints,
    encoders: EncoderEndpoints,
    tokenizers: TokenizerEndpoints,
    ollama: OllamaEndpoints,
    files: FileEndpoints,
    batches: BatchEndpoints,
    anthropic: AnthropicEndpoints,
    responses: ResponseEndpoints,
    conversations: ConversationEndpoints,
    webhooks: WebhookRoutes,
    requests: RequestEndpoints,
    fleet: FleetEndpoints,
    usage: UsageEndpoints,
    audit: AuditEndpoints,
    settings: Settings,
    admission: Admission,
    memory: MemoryAccount,
    keys: ApiKeys | None,
    secret: FleetSecret | None = None,
) -> tuple[Envelope, InnerCalls]:
    """Return the application, and the way to ask it from within.

    `keys`: None where the fleet asks for none. `secret`: the fleet's, None without one.
    """
    app = FastAPI(title="Lorafleet", docs_url=None, redoc_url=None, responses=openapi.OPENAI)
    app.state.settings = settings
    app.state.audit = audit.log
    add_handlers(app, shape_of)
    add_routes(app, endpoints)
    add_native_routes(app, native)
    add_operator_routes(app, operators)
    add_encoder_routes(app, encoders)
    add_tokenizer_routes(app, tokenizers)
    add_ollama_routes(app, ollama)
    add_file_routes(app, files)
    add_batch_routes(app, batches)
    add_anthropic_routes(app, anthropic)
    add_response_routes(app, responses)
    add_conversation_routes(app, conversations)
    add_webhook_routes(app, webhooks)
    add_request_routes(app, requests)
    add_fleet_routes(app, fleet)
    add_usage_routes(app, usage)
    add_console(app, ConsolePages())
    add_console(app, docs_pages())
    add_audit_routes(app, audit)
    bodies = LargeBodies(DirectCalls(app, shape_of), shape_of)
    charged = Charged(bodies, memory, shape_of, settings.max_body_bytes)
    authentication = Authentication(charged, keys, shape_of, secret, open_pages=settings.open_pages)
    guarded: ASGIApp = Admitted(authentication, admission)
    origins = names_of(settings.cors_origins)
    if origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED_HEADERS
        )
    if keys is None:
        guarded = Browsers(guarded, settings, shape_of)
    return Envelope(guarded, settings), InnerCalls(charged)


class Admitted:
    """Refuses calls that are too many before anything is read of them, and counts the others while they last."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 429."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in GENERATION_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            self._admission.check()
        except Overloaded as error:
            await shape_of(scope).response(error)(scope, receive, send)
            return
        with self._admission.enter():
            await self._app(scope, receive, send)


class Envelope:
    """Gives every request an id and a limit of its body's size; counts it, measures it, and logs its failure."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._max_form_bytes = settings.max_file_bytes + SMALL_BODY_BYTES
        self._prefix = settings.path_prefix.rstrip("/")
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, without the path's prefix."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._prefix and f"{scope['path']}/".startswith(f"{self._prefix}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self._prefix) or "/"}
        self._num_open += 1
        self._idle.clear()
        HTTP_REQUESTS_OPEN.inc()
        try:
            await self._answer(scope, receive, send)
        finally:
            HTTP_REQUESTS_OPEN.dec()
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        given = header_of(headers, b"x-request-id") or ""
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        REQUEST_ID_OF.set(request_id)
        refusals: list[str] = []
        REFUSALS_OF.set(refusals)
        ids = [(b"x-request-id", request_id.encode())]
        if speaks_anthropic(scope):
            ids.append((b"request-id", request_id.encode()))
        trace = _trace_of(scope)
        if trace is not None:
            ids.append((b"x-trace-id", trace.place.hex.encode()))
        started_s = time.monotonic()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed_ms = int((time.monotonic() - started_s) * 1000)
                limits = scope[CALLER].headers if CALLER in scope else {}
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), value.encode()) for name, value in limits.items()),
                    *ids,
                    (b"openai-processing-ms", b"%d" % elapsed_ms),
                ]
            await send(message)

        scope[RAW_SEND] = send
        try:
            await self._app(scope, self._limited(scope["path"], headers, receive), send_marked)
        except asyncio.CancelledError:
            if not status:  # The server is closing and waits no longer; uvicorn would answer in plain text.
                error = Unavailable("this gateway is shutting down; another one can take it", code="shutting_down")
                await shape_of(scope).response(error)(scope, receive, send_marked)
            raise
        except BaseException as failure:
            if not is_failure(failure):
                raise
            logger.exception("%s %s failed, x-request-id %s", scope["method"], scope["path"], request_id)
            if not status:  # not yet told by `errors.add_handlers`, which knows of exceptions but not of panics
                await shape_of(scope).response(Internal("the gateway failed"))(scope, receive, send_marked)
        finally:
            if trace is not None and TRACING.tracer is not None:
                trace.tell(TRACING.tracer, status, scope["path"])
        route = getattr(scope.get("route"), "path", "unknown")
        HTTP_REQUESTS.labels(route, scope["method"], str(status)).inc()
        if status == 429:
            observe.refused(scope[CALLER].owner if CALLER in scope else "", refusals[-1] if refusals else "gateway")
        if scope["path"] in GENERATION_PATHS and status != 405:
            lorax_metrics.answered(status, time.monotonic() - started_s)

    def _limited(self, path: str, headers: Sequence[tuple[bytes, bytes]], receive: Receive) -> Receive:
        """Return a `receive` that refuses a body once it has become too large."""
        limit = self._max_body_bytes
        if path in (FILES, UPLOAD):
            limit = self._max_form_bytes
        elif path not in LARGE_BODY_PATHS:
            limit = min(limit, SMALL_BODY_BYTES)
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            waits = not num_bytes and header_of(headers, b"expect") is not None
            if waits and int(header_of(headers, b"content-length") or 0) > limit:
                raise _too_large(limit)  # the client has not begun to send, and need not
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes <= limit:
                return message
            # A client that is still sending would meet a closed connection instead of the answer.
            while message.get("more_body") and num_bytes < DISCARDED_BODIES * self._max_body_bytes:
                message = await receive()
                num_bytes += len(message.get("body", b""))
            raise _too_large(limit)

        return receive_limited


def _trace_of(scope: Scope) -> CallTrace | None:
    """Return the trace of a call, None where it is none or is not traced; log lines and errors name it from now on."""
    if TRACING.tracer is None:
        return None
    trace = None
    if scope["method"] == "POST" and scope["path"] in GENERATION_PATHS:
        place = TRACING.tracer.begin(header_of(scope["headers"], b"traceparent") or "")
        trace = CallTrace(place) if place is not None else None
    TRACE_OF.set(trace)
    TRACE_ID.set(trace.place.hex if trace is not None else "")
    return trace


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes", {"connection": "close"})
