"""The ASGI application: the routes, and the layers around them.

From the outside in: envelope, browsers, CORS, gate, reads, dispatch. The envelope finds a request's route, which all
inner layers use (`access.py`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import orjson
from fastapi import FastAPI
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.answers.call_response import RAW_SEND
from gateway.anthropic.anthropic_routes import AnthropicEndpoints, add_anthropic_routes
from gateway.app.dispatch import Dispatch
from gateway.app.service_routes import Endpoints, add_routes
from gateway.app.shapes import shape_of, speaks_anthropic
from gateway.auth.authentication import Authentication
from gateway.auth.browsers import Browsers
from gateway.auth.callers import CALLER
from gateway.batches.batch_routes import BatchEndpoints, add_batch_routes
from gateway.batches.inner_calls import InnerCalls
from gateway.bodies.fields import REQUEST_ID
from gateway.bodies.json_bodies import JsonRoute
from gateway.bodies.parameter_check import IGNORED_HEADER
from gateway.books.audit_routes import AuditEndpoints, add_audit_routes
from gateway.books.timeseries_routes import TimeSeriesEndpoints, add_timeseries_routes
from gateway.books.usage_routes import UsageEndpoints, add_usage_routes
from gateway.calls import lorax_metrics, observe
from gateway.calls.trace import TRACE_OF, CallTrace
from gateway.console.console_routes import ConsolePages, DocsPages, add_console
from gateway.encoders.encoder_routes import EncoderEndpoints, add_encoder_routes
from gateway.files.file_routes import FileEndpoints, add_file_routes
from gateway.http import openapi
from gateway.http.access import API_PAGE, MATCH, RouteMatch, Routes, RouteTable, check_query, normal_path
from gateway.http.errors import OUTCOME_OF, REQUEST_ID_OF, Outcome, add_handlers
from gateway.http.headers import header_of
from gateway.http.paths import SMALL_BODY_BYTES
from gateway.lorax.lorax_routes import NativeEndpoints, add_native_routes
from gateway.ollama.ollama_routes import OllamaEndpoints, add_ollama_routes
from gateway.openai.openai_routes import OpenAIEndpoints, add_openai_routes
from gateway.operators.adapter_routes import OperatorEndpoints, add_operator_routes
from gateway.operators.operator_routes import FleetEndpoints, add_fleet_routes
from gateway.overload.admission import Admission
from gateway.overload.gate import Gate
from gateway.overload.large import Checks
from gateway.overload.memory import MemoryAccount
from gateway.overload.reads import Reads
from gateway.requests.refusals import Refusals
from gateway.requests.request_routes import RequestEndpoints, add_request_routes
from gateway.responses.conversation_routes import ConversationEndpoints, add_conversation_routes
from gateway.responses.response_routes import ResponseEndpoints, add_response_routes
from gateway.tokenizer.tokenizer_routes import TokenizerEndpoints, add_tokenizer_routes
from gateway.webhooks.webhook_routes import WebhookRoutes, add_webhook_routes
from protocol.metrics.series import HTTP_REQUESTS, HTTP_REQUESTS_OPEN
from protocol.queue.books.api_keys import ApiKeys
from protocol.queue.bus import now_ms
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.guarded import is_failure
from protocol.runtime.settings import Settings, names_of
from protocol.runtime.tracing import TRACE_ID, TRACING
from protocol.wire.errors import BadRequest, Internal, Overloaded, Unavailable

logger = logging.getLogger(__name__)


DISCARDED_BODIES = 8
"""A body that is too large is read and discarded up to this multiple of the limit, so that its client reads the
error."""

EXPOSED_HEADERS = (
    "x-request-id", "request-id", "x-trace-id", "openai-processing-ms", "retry-after", "x-should-retry", IGNORED_HEADER,
    *(f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset") for what in ("requests", "tokens")),
    *(f"anthropic-ratelimit-{what}-{part}" for what in ("requests", "tokens")
      for part in ("limit", "remaining", "reset")),
)  # fmt: skip


SLICE_BYTES = 1 << 16
"""Bytes of an answer passed to the server at once."""


@dataclass(frozen=True, slots=True)
class Handlers:
    """One object of handlers per module of routes."""

    endpoints: Endpoints
    openai: OpenAIEndpoints
    native: NativeEndpoints
    operators: OperatorEndpoints
    encoders: EncoderEndpoints
    tokenizers: TokenizerEndpoints
    ollama: OllamaEndpoints
    files: FileEndpoints
    batches: BatchEndpoints
    anthropic: AnthropicEndpoints
    responses: ResponseEndpoints
    conversations: ConversationEndpoints
    webhooks: WebhookRoutes
    requests: RequestEndpoints
    fleet: FleetEndpoints
    usage: UsageEndpoints
    audit: AuditEndpoints
    timeseries: TimeSeriesEndpoints
    console: ConsolePages
    docs: DocsPages


def routed(handlers: Handlers) -> FastAPI:
    """Return the routes of a gateway."""
    # No redirects for trailing slashes: `RouteTable` accepts both forms.
    app = FastAPI(
        title="Lorafleet",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=openapi.OPENAI,
    )
    add_routes(app, handlers.endpoints)
    add_openai_routes(app, handlers.openai)
    add_native_routes(app, handlers.native)
    add_operator_routes(app, handlers.operators)
    add_encoder_routes(app, handlers.encoders)
    add_tokenizer_routes(app, handlers.tokenizers)
    add_ollama_routes(app, handlers.ollama)
    add_file_routes(app, handlers.files)
    add_batch_routes(app, handlers.batches)
    add_anthropic_routes(app, handlers.anthropic)
    add_response_routes(app, handlers.responses)
    add_conversation_routes(app, handlers.conversations)
    add_webhook_routes(app, handlers.webhooks)
    add_request_routes(app, handlers.requests)
    add_fleet_routes(app, handlers.fleet)
    add_usage_routes(app, handlers.usage)
    add_console(app, handlers.console)
    add_console(app, handlers.docs)
    add_audit_routes(app, handlers.audit)
    add_timeseries_routes(app, handlers.timeseries)
    page, turn = b"", asyncio.Lock()

    async def api_page() -> Response:
        nonlocal page
        async with turn:  # generated once, in a thread: it takes half a second
            page = page or await asyncio.to_thread(lambda: orjson.dumps(app.openapi()))
        return Response(page, media_type="application/json")

    Routes(app, JsonRoute).get("/openapi.json", API_PAGE, include_in_schema=False)(api_page)
    return app


def build_app(
    handlers: Handlers,
    settings: Settings,
    admission: Admission,
    memory: MemoryAccount,
    checks: Checks,
    keys: ApiKeys | None,
    secret: FleetSecret | None = None,
) -> tuple[Envelope, InnerCalls]:
    """Return the application, and an interface for requests made by the gateway itself.

    keys: None if API keys are off. secret: the fleet's, None without one. Raises TypeError for a route without access
    rules.
    """
    app = routed(handlers)
    app.state.settings = settings
    app.state.checks = checks
    app.state.writing = Checks()
    app.state.audit = handlers.audit.log
    add_handlers(app, shape_of)
    table = RouteTable(app.routes, open_pages=settings.open_pages)
    reads = Reads(Dispatch(app, shape_of), shape_of, settings.reads_per_s)
    gate = Gate(reads, shape_of, admission, Authentication(keys, secret), memory, settings.max_body_bytes)
    guarded: ASGIApp = gate
    origins = names_of(settings.cors_origins)
    if origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED_HEADERS
        )
    if keys is None:
        guarded = Browsers(guarded, settings, shape_of)
    return Envelope(guarded, settings, table, handlers.requests.refusals), InnerCalls(gate.inner, table)


class Envelope:
    """Outermost layer: gives requests their route, id and body limit; counts and measures them, and logs failures."""

    def __init__(self, app: ASGIApp, settings: Settings, table: RouteTable, refusals: Refusals | None = None) -> None:
        """table: the routes of `app`. refusals: records refused calls; None: they are not recorded."""
        self._refusals = refusals
        self._app = app
        self._table = table
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
        """Pass on a request under its normalized path, or refuse an ambiguous path."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal: BadRequest | None = None
        try:
            match = self._table.match(scope["method"], normal_path(scope["path"], self._prefix))
            check_query(scope["query_string"])
        except BadRequest as error:
            match, refusal = RouteMatch(scope["path"]), error
        scope = {**scope, MATCH: match, "path": match.path}
        self._num_open += 1
        self._idle.clear()
        HTTP_REQUESTS_OPEN.inc()
        try:
            await self._answer(scope, receive, send, refusal)
        finally:
            HTTP_REQUESTS_OPEN.dec()
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    async def _answer(self, scope: Scope, receive: Receive, send: Send, refusal: BadRequest | None) -> None:
        headers, match = scope["headers"], scope[MATCH]
        given = header_of(headers, b"x-request-id") or ""
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        REQUEST_ID_OF.set(request_id)
        outcome = Outcome(now_ms())
        OUTCOME_OF.set(outcome)
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
            await send_in_slices(message, send)

        scope[RAW_SEND] = send
        try:
            if refusal is not None:
                await shape_of(scope).response(refusal)(scope, receive, send_marked)
            else:
                await self._app(scope, self._limited(match, headers, receive), send_marked)
        except asyncio.CancelledError:
            if not status:  # The server's grace period is over; uvicorn would answer in plain text.
                error = Unavailable(
                    "this gateway is shutting down; retry, so that another one can take it", code="shutting_down"
                )
                await shape_of(scope).response(error)(scope, receive, send_marked)
            raise
        except BaseException as failure:
            if not is_failure(failure):
                raise
            logger.exception("%s %s failed, x-request-id %s", scope["method"], scope["path"], request_id)
            if not status:  # not yet answered by `errors.add_handlers`, which handles exceptions but not panics
                await shape_of(scope).response(Internal("the gateway failed"))(scope, receive, send_marked)
        finally:
            if trace is not None and TRACING.tracer is not None:
                trace.tell(TRACING.tracer, status, scope["path"])
        route = getattr(scope.get("route"), "path", "unknown")
        _count_of(route, scope["method"], status).inc()
        error = outcome.error
        if status == 429:
            reason = error.reason if isinstance(error, Overloaded) else "gateway"
            observe.refused(scope[CALLER].owner if CALLER in scope else "", reason)
        if match.kind == "call":
            observe.answered(scope[CALLER].owner if CALLER in scope else "", status)
            if error is not None and not outcome.is_queued and CALLER in scope and self._refusals is not None:
                self._refusals.note(scope[CALLER].owner, request_id, match.path, status, outcome)
            lorax_metrics.answered(status, time.monotonic() - started_s)

    def _limited(self, match: RouteMatch, headers: Sequence[tuple[bytes, bytes]], receive: Receive) -> Receive:
        """Return a `receive` that raises once a body exceeds its limit."""
        limit = self._max_body_bytes
        if match.kind == "file":
            limit = self._max_form_bytes
        elif not match.is_large:
            limit = min(limit, SMALL_BODY_BYTES)
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            waits = not num_bytes and header_of(headers, b"expect") is not None
            if waits and int(header_of(headers, b"content-length") or 0) > limit:
                raise _too_large(limit)  # the client waits for permission to send
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes <= limit:
                return message
            # Discard some of the rest: a client still sending would see a closed connection instead of the answer.
            while message.get("more_body") and num_bytes < DISCARDED_BODIES * self._max_body_bytes:
                message = await receive()
                num_bytes += len(message.get("body", b""))
            raise _too_large(limit)

        return receive_limited


async def send_in_slices(message: Message, send: Send) -> None:
    """Send a message, with a large body in slices: the server copies each, and other tasks run in between."""
    body = message.get("body", b"")
    for at in range(0, max(len(body) - SLICE_BYTES, 0), SLICE_BYTES):
        await send({**message, "body": body[at : at + SLICE_BYTES], "more_body": True})
        await asyncio.sleep(0)
    rest = max(-(-len(body) // SLICE_BYTES) - 1, 0) * SLICE_BYTES
    await send({**message, "body": body[rest:]} if rest else message)


@cache
def _count_of(route: str, method: str, status: int) -> Counter:
    """Return the counter of a route's answers; prometheus_client's own lookup takes a lock each time."""
    return HTTP_REQUESTS.labels(route, method, str(status))


def _trace_of(scope: Scope) -> CallTrace | None:
    """Start a call's trace, used by its log lines and errors; None if it is not a call or not sampled."""
    if TRACING.tracer is None:
        return None
    trace = None
    if scope[MATCH].kind == "call":
        place = TRACING.tracer.begin(header_of(scope["headers"], b"traceparent") or "")
        trace = CallTrace(place) if place is not None else None
    TRACE_OF.set(trace)
    TRACE_ID.set(trace.place.hex if trace is not None else "")
    return trace


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes", {"connection": "close"})
