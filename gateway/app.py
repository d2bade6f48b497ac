"""The ASGI application: what wraps every request, and the routes."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import add_handlers, error_response
from gateway.routes import Endpoints, add_routes
from protocol.errors import Internal, TooLarge
from protocol.metrics import HTTP_REQUESTS, HTTP_REQUESTS_OPEN

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def build_app(endpoints: Endpoints, max_body_bytes: int) -> Envelope:
    """Return the application."""
    app = FastAPI(title="Lorafleet", docs_url=None, redoc_url=None)
    add_handlers(app)
    add_routes(app, endpoints)
    return Envelope(app, max_body_bytes)


class Envelope:
    """Around every request: an id, the body's size limit, the count of open requests, metrics, the last resort."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
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
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        started_s = time.monotonic()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed_ms = int((time.monotonic() - started_s) * 1000)
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", b"%d" % elapsed_ms),
                ]
            await send(message)

        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            # The body is not read, so the connection cannot be used again.
            await error_response(self._too_large(), {"connection": "close"})(scope, receive, send_marked)
        else:
            try:
                await self._app(scope, self._limited(receive), send_marked)
            except Exception:
                logger.exception("%s %s failed, x-request-id %s", scope["method"], scope["path"], request_id)
                if status == 0:
                    await error_response(Internal("the gateway failed"))(scope, receive, send_marked)
        route = getattr(scope.get("route"), "path", "unknown")
        HTTP_REQUESTS.labels(route, scope["method"], str(status)).inc()

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` that refuses a body of unknown length once it has become too large."""
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large().message, {"connection": "close"})
            return message

        return receive_limited

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self._max_body_bytes} bytes", code="body_too_large")
