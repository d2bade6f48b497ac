"""One client connection: uvicorn's protocol, with additional limits of bytes and time.

uvicorn and httptools bound the buffered bytes of a body (reading pauses at 64 kB) and of an answer (writing pauses
too), and close idle connections. They do not bound a request's head, its chunk framing, pipelined requests, or the time
that any of these take. Heads are counted as they arrive; times are checked once a second by `Connection.sweep`, so that
a request needs no timer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.http.errors import HttpError, ShapeOf
from gateway.overload.memory import Charge
from protocol.metrics.series import HTTP_DROPPED
from protocol.wire.errors import LorafleetError

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 1 << 16
"""Maximum bytes of a request's head (request line and headers), and of chunk framing beyond the body's own size."""

MAX_HEADERS = 128

MAX_PIPELINED = 16
"""Maximum requests pipelined on one connection."""

MIN_BYTES_PER_S = 8192
"""Minimum rate of a client: timeouts of bodies and answers are extended by their bytes at this rate."""

FREE_BYTES = 1 << 12
"""Bytes of a head, or of an unread body, for which a connection is not charged; honest requests rarely have more."""

UNSENT_BYTES = 1 << 13
"""Unsent bytes of an answer, beyond the system's buffers, above which writing pauses and the client's address is
charged."""

LINGER_S = 2.0
"""Seconds for which the rest of a refused request is read and discarded, so that its client can read the answer."""

MAX_LINGER_BYTES = 1 << 22

MAX_HELD_BYTES = 1 << 16
"""Maximum bytes of answers, on all connections together, buffered until the loop's next iteration."""

CONNECTION = "lorafleet.connection"
"""Scope key of a request's connection, for `takes_parts` and `write_part`."""

Phase = Literal["idle", "head", "body", "answer", "linger"]


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Time limits of clients."""

    idle_s: float = 75.0  # maximum idle time; longer than load balancers' usual 60 s: they close first
    head_s: float = 15.0
    body_s: float = 60.0  # plus a second per MIN_BYTES_PER_S received bytes
    send_s: float = 60.0  # maximum time for a client to read its answer, plus a second per MIN_BYTES_PER_S unsent bytes
    discarded_bytes: int = 32 << 20  # maximum discarded bytes of an unread body


class Parts:
    """Buffers parts of several answers, to write them together.

    A step yields a token for each of many streams. Making all parts before writing any is faster than alternating: the
    code of Python and of the kernel evict each other from the CPU caches.
    """

    def __init__(self) -> None:
        self._held: list[tuple[asyncio.Transport, bytes]] = []
        self._num_bytes = 0

    def add(self, transport: asyncio.Transport, part: bytes) -> None:
        """Buffer a part. It is written before any callback that is added to the loop from now on."""
        if not self._held:
            asyncio.get_running_loop().call_soon(self._write)
        self._held.append((transport, part))
        self._num_bytes += len(part)
        if self._num_bytes > MAX_HELD_BYTES:
            self._write()

    def _write(self) -> None:
        held, self._held, self._num_bytes = self._held, [], 0
        for transport, part in held:
            if not transport.is_closing():
                transport.write(b"%x\r\n%b\r\n" % (len(part), part))


class _RefusedError(Exception):
    """Aborts the parsing of a request."""


class Connection(HttpToolsProtocol):
    """A connection that is dropped, with a reason, if its client exceeds a limit."""

    def __init__(
        self, *args: Any, limits: ConnectionLimits, shape_of: ShapeOf,
        on_lost: Callable[[], object], charge: Charge, parts: Parts, **more: Any,
    ) -> None:  # fmt: skip
        """Store the limits. shape_of: the error format of a request; on_lost: called when the connection ends.

        charge: the address's charge for unread input and unsent output. parts: shared by the server's connections.
        """
        super().__init__(*args, **more)
        self._charge = charge
        self._limits = limits
        self._shape_of = shape_of
        self._on_lost = on_lost
        self._parts = parts
        self._phase: Phase = "idle"
        self._since_s = self.loop.time()  # start of the phase, in loop time
        self._num_bytes = 0  # bytes received in the phase, roughly: a chunk counts for the request it ends in
        self._num_body = 0  # bytes of the body among them
        self._num_headers = 0
        self._head_bytes = 0
        self._unsent_since_s: float | None = None  # loop time since which the client has not read
        self._unsent_bytes = 0
        self._refusal: LorafleetError | None = None
        self._answering: RequestResponseCycle | None = None  # `cycle` is the latest request

    # ------------------------------------------------------------ memory

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Set the limit of the write buffer."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT_BYTES)

    def _settle(self) -> None:
        """Charge the address for the bytes that this connection holds; without room, refuse the request or drop it."""
        held = self.transport.get_write_buffer_size() + (self._num_bytes if self._phase == "head" else 0)
        cycles = [self.cycle] if self.cycle is not None else []
        held += sum(len(cycle.body) for cycle in (*cycles, *(waiting for waiting, _ in self.pipeline)))
        try:
            self._charge.hold(max(0, held - FREE_BYTES))
        except LorafleetError as error:
            if self._phase == "head":
                self._refuse(error)
            else:
                self._drop("memory")

    # ------------------------------------------------------------ input

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, within the limits."""
        if self._phase == "linger":
            self._num_bytes += len(data)
            if self._num_bytes > MAX_LINGER_BYTES:
                self.transport.abort()
            return
        if self._phase == "idle":
            self._enter("head")
        self._num_bytes += len(data)
        super().data_received(data)
        if self._phase == "head" and self._num_bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        elif self._phase == "body":
            if self._num_bytes > MAX_HEAD_BYTES + 2 * self._num_body:
                self._refuse(HttpError(400, "the body's chunks are too small, or have too much overhead"))
            elif self._num_body > self._limits.discarded_bytes:
                self._drop("body_too_large")
        if self._num_bytes + len(data) > FREE_BYTES and not self.transport.is_closing():
            self._settle()

    def on_url(self, url: bytes) -> None:
        """Count and store a part of the request line."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count and store a header. Trailers after a body are counted, and ignored."""
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            self._fail(HttpError(431, f"a request may have at most {MAX_HEADERS} headers", code="headers_too_large"))
        self._count_head(len(name) + len(value) + 4)
        if self._phase == "head" and name.lower() != b"cookie":  # no route has any, and every one would parse them
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        """Reset the counters for a new request."""
        super().on_message_begin()
        self._num_headers = self._head_bytes = 0
        if self._phase != "head":
            self._enter("head")

    def on_headers_complete(self) -> None:
        """Start handling the request, unless too many are pipelined."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(HttpError(400, f"at most {MAX_PIPELINED} requests may be pipelined", code="too_many_requests"))
        self._enter("body")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count and pass on a part of the body."""
        self._num_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Enter the next phase after a complete request."""
        is_answered = self.cycle is None or self.cycle.response_complete
        self._enter("idle" if is_answered and not self.pipeline else "answer")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Enter the idle phase after a complete answer."""
        if self._phase == "answer" and not self.pipeline:
            self._enter("idle")
        super().on_response_complete()

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._since_s = self.loop.time()
        self._num_bytes = self._num_body = 0

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._fail(_head_too_large())

    def _fail(self, error: LorafleetError) -> None:
        """Abort the parser, which then calls `send_400_response`."""
        self._refusal = error
        raise _RefusedError

    # ------------------------------------------------------------ output

    def pause_writing(self) -> None:
        """Record since when the client reads too slowly."""
        self._unsent_since_s, self._unsent_bytes = self.loop.time(), self.transport.get_write_buffer_size()
        super().pause_writing()
        self._settle()

    def resume_writing(self) -> None:
        """Record that the client has caught up."""
        self._unsent_since_s = None
        super().resume_writing()
        self._settle()

    @property
    def takes_parts(self) -> bool:
        """Whether `write_part` may be called: the answer has begun, is chunked, and its client keeps up."""
        cycle = self._answering
        return (
            cycle is not None
            and not self.flow.write_paused
            and cycle.chunked_encoding is True
            and not cycle.response_complete
            and not cycle.disconnected
        )

    def write_part(self, part: bytes) -> None:
        """Write a non-empty part of the answer in this iteration of the loop.

        What follows must be written in a later one.
        """
        self._parts.add(self.transport, part)

    # ------------------------------------------------------------ end

    def sweep(self, now_s: float) -> None:
        """Close the connection if its client takes too long."""
        limits, seconds = self._limits, now_s - self._since_s
        if self._charge.num_bytes:
            self._settle()
        if self._unsent_since_s is not None:
            if now_s - self._unsent_since_s > limits.send_s + self._unsent_bytes / MIN_BYTES_PER_S:
                self._drop("slow_reader")
        elif self.transport.is_closing():
            # The last bytes sent are few, yet the client does not read them.
            self._unsent_since_s, self._unsent_bytes = now_s, 0
        elif (self._phase == "linger" and seconds > LINGER_S) or (self._phase == "idle" and seconds > limits.idle_s):
            self.transport.close()
        elif self._phase == "head" and seconds > limits.head_s:
            HTTP_DROPPED.labels("slow_head").inc()
            self._refuse(_too_slow(f"the request's head took longer than {limits.head_s:g} s"))
        elif self._phase == "body" and not self.flow.read_paused and seconds > self._body_s():
            HTTP_DROPPED.labels("slow_body").inc()
            self._refuse(_too_slow(f"the request's body arrived too slowly: {self._num_body} bytes in {seconds:.0f} s"))

    def _body_s(self) -> float:
        """Return the maximum seconds for the body received so far."""
        return self._limits.body_s + self._num_body / MIN_BYTES_PER_S

    def send_400_response(self, msg: str) -> None:
        """Answer input that is not HTTP, or that exceeds a limit."""
        error, self._refusal = self._refusal or HttpError(400, msg, code="invalid_http"), None
        self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the charge, and notify the server and the running requests."""
        self._charge.close()
        self._on_lost()
        self._abandon()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Record which request is being answered: further ones may be pipelined."""
        self._answering = cycle
        cycle.scope[CONNECTION] = self  # type: ignore[typeddict-unknown-key]
        super()._start_asgi_task(cycle, app)

    def _refuse(self, error: LorafleetError) -> None:
        """Answer a request with an error and close; drop the connection if another answer is in progress."""
        if self.transport.is_closing():
            return
        if self._is_answering():
            self._drop("broken_request")
            return
        path = getattr(self, "url", b"").partition(b"?")[0].decode("latin-1")
        scope = {"path": path, "headers": getattr(self, "headers", [])}
        self.transport.write(_as_bytes(self._shape_of(scope).response(error)))
        self._abandon()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._enter("linger")

    def _is_answering(self) -> bool:
        """Return whether an answer has begun or is due, so that an error would be mistaken for it."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        return bool(self.pipeline) or self._phase == "head" or self.cycle.response_started

    def _abandon(self) -> None:
        """Notify the requests being answered that the client has gone."""
        self.pipeline.clear()
        for cycle in (self._answering, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.flow.resume_reading()
        self.flow.resume_writing()

    def _drop(self, reason: str) -> None:
        HTTP_DROPPED.labels(reason).inc()
        logger.warning("the connection of %s is dropped: %s", self.client, reason)
        self.transport.abort()
        self._abandon()


def _head_too_large() -> HttpError:
    return HttpError(431, f"the head of a request may have at most {MAX_HEAD_BYTES} bytes", code="headers_too_large")


def _too_slow(message: str) -> HttpError:
    return HttpError(408, message, code="request_timeout")


def _as_bytes(response: Response) -> bytes:
    """Return a response as HTTP/1.1 bytes, with `connection: close`."""
    headers = [*response.raw_headers, (b"connection", b"close")]
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return STATUS_LINE[response.status_code] + lines + b"\r\n" + bytes(response.body)
