"""The response to a call: it waits for the answer, sends it, and knows whether the client is still there.

An answer that is ready soon is sent as it is. While a later one is awaited the connection is kept alive. One task
watches the client, from the first time that it matters until the end.
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
"""Scope key of the server's own `send`: wrappers between server and route need only the start of a response."""


class SentAnswer(ABC):
    """An answer that comes part by part, and is sent by the response to its call."""

    @abstractmethod
    async def send(self, to: CallResponse) -> None:
        """Send all of the answer. Raises what goes wrong: an HTTP error before the headers, `failed` after them."""

    @abstractmethod
    def failed(self, error: LorafleetError) -> bytes:
        """Return what an answer ends with that fails after its headers."""

    @abstractmethod
    async def close(self) -> None:
        """Give up what still runs for the answer, whether it was sent or not."""


CallResult = Response | SentAnswer
"""What a call comes to."""


class CallResponse(Response):
    """Sends what a call comes to.

    Nothing is sent for `keepalive_s`, nor while the call is inbound, so that what goes wrong until then is raised and
    becomes an HTTP error. After that a stream gets its headers, an idle part each `keepalive_s`, and errors as parts.
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
        """`coming` is awaited once the response is sent; `errors` writes an error in a stream, `framing` its parts."""
        self._coming = coming
        self._stream = stream
        self.keepalive_s = keepalive_s
        self._errors = errors
        self._framing = framing
        self._client: asyncio.Task[None] | None = None  # ends when the client leaves
        self.has_begun = False  # the headers of a stream are sent
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. Raises what goes wrong before anything is sent."""
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
                self._unwatch()  # it watches the client itself, if it takes long to send
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
                        await result.close()  # before anything else is waited for, in which this may be cancelled
            finally:
                self._unwatch()

    def client(self) -> asyncio.Task[None]:
        """Return the task that ends when the client leaves."""
        if self._client is None:
            self._client = asyncio.create_task(disconnected(self._receive))
        return self._client

    async def begin(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the headers of a stream, if none have been sent."""
        if not self.has_begun:
            self.has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, part: bytes, *, more: bool = True) -> None:
        """Send a part of a stream that has begun."""
        await self._send_body({"type": "http.response.body", "body": part, "more_body": more})

    async def send_response(self, response: Response) -> None:
        """Send a response of its own in place of a stream. Raises RuntimeError once that has begun."""
        if self.has_begun:
            raise RuntimeError("a call whose stream has begun came to a whole response")
        await response(self.scope, self._receive, self._send)

    async def _keep_alive(self, coming: asyncio.Task[CallResult]) -> bool:
        """Wait until the answer is there; False when the client leaves first."""
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
        """Return what a stream ends with whose answer never came."""
        return self._framing.event(self._errors.body(error))

    def _unwatch(self) -> None:
        """Watch the client no more. A watch that is begun now comes after the end of this one."""
        client, self._client = self._client, None
        if client is not None and not client.cancel() and not client.cancelled():
            client.exception()  # of no interest any more


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task unless it is done, and wait for its end. Its result or failure is of no interest any more."""
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
