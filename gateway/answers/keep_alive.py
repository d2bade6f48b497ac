"""The response to a call whose answer may take long to begin, as when its adapter has to be fetched.

An answer that is ready soon is sent as it is. While a later one is awaited the connection is kept alive, and a client
that leaves is noticed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.answers.sse import GenerationResponse
from gateway.bodies.json_bodies import disconnected
from gateway.calls.job_stream import JobStream
from gateway.calls.writers import SSE, Framing
from gateway.http.errors import OPENAI_ERRORS, ErrorShape, error_of
from gateway.overload import large
from gateway.overload.admission import is_inbound
from protocol.metrics.series import CLIENTS_GONE
from protocol.runtime.guarded import is_failure


class KeepAliveResponse(Response):
    """Becomes the response that an answer comes to.

    Nothing is sent for `keepalive_s`, nor while the call is inbound, so that what goes wrong until then is raised and
    becomes an HTTP error. After that a stream gets its headers, an idle part each `keepalive_s`, and errors as parts.
    """

    def __init__(
        self,
        answer: Coroutine[Any, Any, Response],
        *,
        stream: bool,
        keepalive_s: float,
        errors: ErrorShape = OPENAI_ERRORS,
        framing: Framing = SSE,
    ) -> None:
        """`answer` is awaited once the response is sent; `errors` writes an error in a stream, `framing` its parts."""
        self._answer = answer
        self._stream = stream
        self._keepalive_s = keepalive_s
        self._errors = errors
        self._framing = framing
        self._has_headers = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. Raises what goes wrong before anything is sent."""
        answer, is_taken = asyncio.create_task(self._answer), False
        try:
            await asyncio.wait([answer], timeout=self._keepalive_s)
            if not answer.done() and not await self._keep_alive(answer, receive, send):
                CLIENTS_GONE.inc()
                return
            response = answer.result()
            is_taken = True
            large.free()
        except BaseException as failure:
            if not self._has_headers or not is_failure(failure):
                raise
            body = self._framing.event(self._errors.body(error_of(failure)))
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return
        finally:
            await _end(answer)
            if not is_taken:
                await _let_go(answer)
        if isinstance(response, GenerationResponse | JobStream):
            response.started = self._has_headers
        await response(scope, receive, send)

    async def _keep_alive(self, answer: asyncio.Task[Response], receive: Receive, send: Send) -> bool:
        """Wait until the answer is there; False when the client leaves first."""
        client = asyncio.create_task(disconnected(receive))
        try:
            while not answer.done():
                if client.done():
                    return False
                if self._stream and not is_inbound():
                    await self._send_idle(send)
                await asyncio.wait([answer, client], timeout=self._keepalive_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(client)
        return True

    async def _send_idle(self, send: Send) -> None:
        """Send an idle part, after the headers if they have not been sent."""
        if not self._has_headers:
            self._has_headers = True
            await send({"type": "http.response.start", "status": 200, "headers": self._framing.headers})
        frame = self._framing.idle("its adapter is being fetched")
        await send({"type": "http.response.body", "body": frame, "more_body": True})


async def _let_go(answer: asyncio.Task[Response]) -> None:
    """Close the generation of an answer that nobody takes: it has come when its client left, or with a cancellation."""
    if answer.cancelled() or answer.exception() is not None:
        return
    response = answer.result()
    if isinstance(response, GenerationResponse):
        await response.generation.close()


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task unless it is done, and wait for its end. Its result or failure is of no interest any more."""
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
