"""The response to a call: waits for the answer, sends it, and detects when the client leaves.

An answer that is ready soon is sent at once; otherwise the connection is kept alive. One task watches the client from
the first time that this matters until the end.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.bodies.json_bodies import disconnected
from gateway.calls.writers import SSE, Framing
from gateway.http.errors import OPENAI_ERRORS, ErrorShape, error_of
from gateway.overload import large
from gateway.overload.cost import is_inbound
from protocol.metrics.series import CLIENTS_GONE
from protocol.runtime.guarded import is_failure
from protocol.wire.errors import LorafleetError

RAW_SEND = "lorafleet.send"
"""Scope key of the server's own `send`: the layers between server and route process only the start of a response."""


class SentAnswer(ABC):
    """An answer that is produced part by part, and sent by the response to its call."""

    @abstractmethod
    async def send(self, to: CallResponse) -> None:
        """Send the whole answer.

        Raises errors; before the headers they become an HTTP error, after them `failed` is sent.
        """

    @abstractmethod
    def failed(self, error: LorafleetError) -> bytes:
        """Return the end of an answer that fails after its headers."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the work for the answer, whether it was sent or not."""


CallResult = Response | SentAnswer
"""The result of a call: a complete response, or an answer to be sent."""


class CallResponse(Response):
    """Waits for the result of a call and sends it.

    Nothing is sent during the first `keepalive_s`, nor while the call is inbound, so that errors until then become HTTP
    errors. After that a stream gets its headers, an idle part every `keepalive_s`, and errors as parts.
    """

    def __init__(
        self,
        coming: Coroutine[Any, Any, CallResult],
        *,
        stream: bool,
        keepalive_s: float,
        errors: ErrorShape = OPENAI_ERRORS,
        framing: Framing = SSE,
    ) -> None:
        """coming: awaited while the response is sent; errors: format of errors in a stream; framing: of its parts."""
        self._coming = coming
        self._stream = stream
        self.keepalive_s = keepalive_s
        self._errors = errors
        self._framing = framing
        self._client: asyncio.Task[None] | None = None  # done when the client has left
        self.has_begun = False  # the headers of a stream have been sent
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. Raises errors that occur before anything was sent."""
        self.scope, self._receive, self._send = scope, receive, send
        self._send_body: Send = scope.get(RAW_SEND, send)
        coming, failed = asyncio.create_task(self._coming), self._failed
        try:
            await asyncio.wait([coming], timeout=self.keepalive_s)
            if not coming.done() and not await self._keep_alive(coming):
                CLIENTS_GONE.inc()
                return
            result = coming.result()
            large.free()
            if isinstance(result, SentAnswer):
                failed = result.failed
                await result.send(self)
            else:
                self._unwatch()  # a long response watches the client itself
                await self.send_response(result)
        except BaseException as failure:
            if not self.has_begun or not is_failure(failure):
                raise
            await self.write(failed(error_of(failure)), more=False)
        finally:
            try:
                await _end(coming)
                if not coming.cancelled() and coming.exception() is None:
                    result = coming.result()
                    if isinstance(result, SentAnswer):
                        await result.close()  # first, because any other await may be cancelled
            finally:
                self._unwatch()

    def client(self) -> asyncio.Task[None]:
        """Return the task that is done when the client has left."""
        if self._client is None:
            self._client = asyncio.create_task(disconnected(self._receive))
        return self._client

    async def begin(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the headers of a stream, unless they have been sent."""
        if not self.has_begun:
            self.has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, part: bytes, *, more: bool = True) -> None:
        """Send a part of a stream that has begun."""
        await self._send_body({"type": "http.response.body", "body": part, "more_body": more})

    async def send_response(self, response: Response) -> None:
        """Send a complete response instead of a stream. Raises RuntimeError if the stream has begun."""
        if self.has_begun:
            raise RuntimeError("a call whose stream has begun came to a whole response")
        await response(self.scope, self._receive, self._send)

    async def _keep_alive(self, coming: asyncio.Task[CallResult]) -> bool:
        """Wait until the answer is ready; return False if the client leaves first."""
        client = self.client()
        while not coming.done():
            if client.done():
                return False
            if self._stream and not is_inbound():
                await self.begin(self._framing.headers)
                await self.write(self._framing.idle("its adapter is being fetched"))
            await asyncio.wait([coming, client], timeout=self.keepalive_s, return_when=asyncio.FIRST_COMPLETED)
        return True

    def _failed(self, error: LorafleetError) -> bytes:
        """Return the end of a stream that fails before its answer."""
        return self._framing.event(self._errors.body(error))

    def _unwatch(self) -> None:
        """Stop watching the client, without waiting: a watch that is started now begins after the old one has ended."""
        client, self._client = self._client, None
        if client is not None and not client.cancel() and not client.cancelled():
            client.exception()  # retrieved, so that it is not logged


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task unless it is done, and wait for its end. Its result or error is ignored."""
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
