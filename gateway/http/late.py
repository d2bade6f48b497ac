"""Responses that have to wait for their adapter: the client is kept company, and noticed when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.calls.writers import comment, event
from gateway.http.errors import OPENAI_ERRORS, ErrorShape, error_of
from gateway.http.sse import STREAM_HEADERS, GenerationResponse
from protocol.runtime.metrics import CLIENTS_GONE


async def in_time(
    answer: Coroutine[Any, Any, Response], *, stream: bool, keepalive_s: float, errors: ErrorShape = OPENAI_ERRORS
) -> Response:
    """Return the response that `answer` comes to, or after `keepalive_s` one that waits for it with the client.

    What goes wrong before that is raised, so that it is an HTTP error.
    """
    task = asyncio.ensure_future(answer)
    try:
        done, _ = await asyncio.wait([task], timeout=keepalive_s)
    except asyncio.CancelledError:
        task.cancel()
        raise
    return task.result() if done else LateResponse(task, errors, stream=stream, keepalive_s=keepalive_s)


class LateResponse(Response):
    """Waits for another response and becomes it. A stream gets its headers now, and a comment now and then."""

    def __init__(self, answer: asyncio.Task[Response], errors: ErrorShape, *, stream: bool, keepalive_s: float) -> None:
        self._task = answer
        self._errors = errors
        self._stream = stream
        self._keepalive_s = keepalive_s
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            if not await self._wait(gone, send):
                CLIENTS_GONE.inc()
                return
        finally:
            gone.cancel()
            self._task.cancel()
        try:
            response = self._task.result()
        except Exception as failure:
            if not self._stream:
                raise
            body = event(self._errors.body(error_of(failure)))
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return
        if isinstance(response, GenerationResponse):
            response.started = self._stream
        await response(scope, receive, send)

    async def _wait(self, gone: asyncio.Task[None], send: Send) -> bool:
        """Wait until the answer is there; False when the client leaves first."""
        if self._stream:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        while not self._task.done():
            if self._stream:
                await send(
                    {"type": "http.response.body", "body": comment("its adapter is being fetched"), "more_body": True}
                )
            await asyncio.wait([self._task, gone], timeout=self._keepalive_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not self._task.done():
                return False
        return True


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
