"""A small HTTP/1.1 client that reads server-sent events and records the arrival time of each.

It may share the machine with the measured server, so it must be cheap: one callback per socket read, and no task switch
per event. It does not depend on load patterns.
"""

import asyncio
import ssl
import time
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

from lorafleet.bench.result import BenchRequest

_MAX_ERROR_CHARS = 200


class StaleConnectionError(ConnectionError):
    """The server closed an idle connection just as it was reused, so the request can be sent again."""


class BenchConnection(asyncio.Protocol):
    """A keep-alive connection for one request at a time."""

    def __init__(self) -> None:
        """Prepare; the connection is usable after `connection_made`."""
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self._kept = False  # whether it has carried a request before
        self._parser = httptools.HttpResponseParser(self)
        self._record: BenchRequest | None = None
        self._done: asyncio.Future[None] | None = None
        self._buffer = b""
        self._sent_s = 0.0
        self._now = 0.0  # time of the latest bytes
        self._status = 0

    async def exchange(self, request: bytes, record: BenchRequest) -> None:
        """Send `request` and fill `record` until the response ends. Raises ConnectionError if the connection fails."""
        assert self.transport is not None
        self._record, self._buffer, self._status = record, b"", 0
        self._done = asyncio.get_running_loop().create_future()
        self._sent_s = time.perf_counter()
        self.transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()  # the rest of this response may still arrive
            raise
        finally:
            self._record = self._done = None
            self._kept = True

    def close(self) -> None:
        """Close the connection."""
        self.closed = True
        if self.transport is not None:
            self.transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self.transport = cast(asyncio.Transport, transport)  # other loops' transports need not inherit from it

    def data_received(self, data: bytes) -> None:
        """Record the time and parse the bytes."""
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(ConnectionError(f"unreadable answer: {error.__context__ or error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request in progress with an error."""
        self.closed = True
        stale = self._kept and self._now < self._sent_s
        kind = StaleConnectionError if stale else ConnectionError
        self._finish(kind(f"connection lost ({exc or 'closed by the server'})"))

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """Record a header of a response other than 200."""
        if self._record is not None and self._parser.get_status_code() != 200:
            self._record.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Record the status."""
        self._status = self._parser.get_status_code()
        if self._record is not None:
            self._record.status = self._status

    def on_body(self, body: bytes) -> None:
        """Record the complete events, and keep the rest."""
        if self._record is None:
            return
        self._buffer += body
        if self._status != 200:
            return
        if b"\r" in self._buffer:
            self._buffer = self._buffer.replace(b"\r\n", b"\n")
        *events, self._buffer = self._buffer.split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                _note_event(self._record, event[5:].strip(), self._now)

    def on_message_complete(self) -> None:
        """End the request; record the text of an error."""
        if self._record is not None:
            self._record.end_s = self._now
            if self._status != 200:
                text = self._buffer.decode(errors="replace")[:_MAX_ERROR_CHARS]
                self._record.error = f"HTTP {self._status}: {text}"
        if not self._parser.should_keep_alive():
            self.close()
        self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)


def _note_event(record: BenchRequest, payload: bytes, now_s: float) -> None:
    if payload == b"[DONE]":
        record.complete = True
        return
    chunk = orjson.loads(payload)
    if (error := chunk.get("error")) is not None:
        record.error = str(error)[:_MAX_ERROR_CHARS]
        return
    if (usage := chunk.get("usage")) is not None:
        record.prompt_tokens = usage["prompt_tokens"]
        record.output_tokens = usage["completion_tokens"]
    choices = chunk.get("choices")
    if not choices:
        return
    choice = choices[0]
    # A chunk has no text while the server holds text back, such as an incomplete character or the start of a stop
    # string.
    if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
        record.arrivals_s.append(now_s)
        record.text += text
    record.finish_reason = choice.get("finish_reason") or record.finish_reason


def api_base(url: str) -> str:
    """Return `url` with a scheme, and without a trailing slash or /v1. Raises ValueError unless it is http(s)."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an http(s) URL")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


class Client:
    """A client of one server, with one connection per request in flight."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Prepare a client of `url`, which may end in /v1. Raises ValueError unless it is http(s)."""
        parts = urlsplit(api_base(url))
        self._host, self._tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nContent-Type: application/json\r\n"
        if api_key is not None:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[BenchConnection] = []

    async def post(self, path: str, body: dict[str, Any], record: BenchRequest) -> None:
        """Stream the response to a POST into `record`. Raises OSError if the server is unreachable or disconnects."""
        content = orjson.dumps(body)
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(content)}\r\n\r\n"
        while True:
            connection = await self._connect()
            try:
                await connection.exchange(head.encode() + content, record)
            except StaleConnectionError:
                continue
            if not connection.closed:
                self._idle.append(connection)
            return

    async def _connect(self) -> BenchConnection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        context = ssl.create_default_context() if self._tls else None
        _, connection = await asyncio.get_running_loop().create_connection(
            BenchConnection, self._host, self._port, ssl=context
        )
        return connection

    def close(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.pop().close()
