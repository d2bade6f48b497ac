"""Calls made by the gateway itself, without a client: each is processed like an HTTP request.

So a batch may use every endpoint, with the same answers and errors as elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

from gateway.answers.call_response import RAW_SEND
from gateway.auth.callers import CALLER, Caller
from gateway.http.access import MATCH, RouteTable
from protocol.runtime.guarded import is_failure

logger = logging.getLogger(__name__)

FEW_PARTS = 8
"""Maximum parts of an answer joined on the event loop: large answers have parts of some kilobytes."""


@dataclass(frozen=True, slots=True)
class CallAnswer:
    """The response of an endpoint."""

    status: int
    headers: Mapping[str, str]
    body: bytes  # JSON

    @property
    def retry_after_s(self) -> float:
        """Seconds after which a retry may succeed."""
        given = self.headers.get("retry-after", "")
        return float(given) if given.isdecimal() else 1.0


class InnerCalls:
    """Calls this gateway's endpoints."""

    def __init__(self, app: ASGIApp, table: RouteTable) -> None:
        """app: the application, without admission and authentication. table: its routes."""
        self._app = app
        self._table = table

    async def post(self, path: str, body: bytes, caller: Caller, key: str) -> CallAnswer:
        """Return the response to a JSON body sent with an Idempotency-Key.

        A cancelled call continues in the queue; the same key finds it again.
        """
        scope: Scope = {
            "type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"", "client": None,
            "scheme": "http", "http_version": "1.1", "server": None,
            "headers": [
                (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
                (b"idempotency-key", key.encode()),
            ],
            CALLER: caller, MATCH: self._table.match("POST", path),
        }  # fmt: skip
        start: Message = {}
        request_id = f"req_{uuid.uuid4().hex}"
        parts: list[bytes] = []
        received, has_ended = False, asyncio.Event()

        async def receive() -> Message:
            nonlocal received
            if received:
                await has_ended.wait()
                return {"type": "http.disconnect"}
            received = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        scope[RAW_SEND] = send
        try:
            await self._app(scope, receive, send)
        except BaseException as failure:
            if not is_failure(failure) or not start:
                raise
            logger.exception("%s failed for a batch, x-request-id %s", path, request_id)  # the answer is complete
        finally:
            has_ended.set()
        headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        headers["x-request-id"] = request_id
        whole = await asyncio.to_thread(b"".join, parts) if len(parts) > FEW_PARTS else b"".join(parts)
        return CallAnswer(start["status"], headers, whole)
