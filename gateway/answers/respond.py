"""Shared by the handlers of calls: the body as received, and the answer as a response."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from starlette.responses import Response

from gateway.answers.call_response import CallResponse, CallResult, SentAnswer
from gateway.bodies.fields import REQUEST_ID
from gateway.calls.parsed_call import Sent
from gateway.calls.writers import SSE, Framing
from gateway.http.errors import OPENAI_ERRORS, ErrorShape
from protocol.wire.errors import BadRequest, Unavailable

MAX_KEY_CHARACTERS = 255
"""Maximum characters of an Idempotency-Key."""


class Answers:
    """Makes responses of calls, until the gateway drains."""

    def __init__(self, keepalive_s: float) -> None:
        """keepalive_s: seconds without output after which keep-alive bytes are sent, against timeouts of proxies."""
        self._keepalive_s = keepalive_s
        self.draining = False

    async def respond(
        self,
        answer: Coroutine[Any, Any, CallResult],
        *,
        stream: bool = False,
        errors: ErrorShape = OPENAI_ERRORS,
        framing: Framing = SSE,
    ) -> Response:
        """Return the response to a call, kept alive until its result is ready. Raises Unavailable while draining."""
        if self.draining:
            answer.close()
            raise Unavailable(
                "this gateway is shutting down; retry, so that another one can take the request", code="shutting_down"
            )
        return CallResponse(answer, stream=stream, keepalive_s=self._keepalive_s, errors=errors, framing=framing)

    def show(self, answer: SentAnswer) -> Response:
        """Return the response that sends an existing answer, such as that of an earlier call."""
        return CallResponse(_ready(answer), stream=True, keepalive_s=self._keepalive_s)


async def _ready(answer: SentAnswer) -> SentAnswer:
    return answer


async def sent_of(endpoint: str, request: Request) -> Sent:
    """Return a body as received. Raises BadRequest for an Idempotency-Key that is too long."""
    headers = request.headers
    key, request_id = headers.get("idempotency-key", ""), headers.get("x-request-id", "")
    if len(key) > MAX_KEY_CHARACTERS:
        raise BadRequest(f"an Idempotency-Key may have at most {MAX_KEY_CHARACTERS} characters")
    return Sent(endpoint, await request.body(), key, request_id if REQUEST_ID.fullmatch(request_id) else "")
