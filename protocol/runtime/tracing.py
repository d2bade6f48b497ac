"""Spans of requests, exported to an OpenTelemetry collector over OTLP. Off unless `otlp_endpoint` is set.

A span is exported once, after its end: no span is kept open, and tasks carry no OpenTelemetry context. All spans of a
request have the same trace id, which the queue's messages carry as a W3C `traceparent`. The span id of an assignment is
derived from the request and its epoch. So the next owner can link to it, and the scheduler can export it for a worker
that died.

If tracing is off, this module does not import OpenTelemetry, `TRACING.tracer` is None, and messages carry no trace.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from protocol.wire.errors import BadRequest

if TYPE_CHECKING:
    from protocol.runtime.settings import Settings

SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"
"""The version of the semantic conventions, including those for generative AI, from which attribute names are taken."""

EXPORT_MS = 1000
"""Maximum delay in ms before an ended span is exported, so that it survives its worker."""

MAX_WAITING = 8192
"""Maximum number of queued spans while a collector does not respond; further ones are dropped."""

FLUSH_S = 2.0
"""Maximum seconds that a stopping service waits for the export of its last spans."""

TRACE_ID: ContextVar[str] = ContextVar("trace_id", default="")
"""The trace id of the request that the current task works for, for log lines and errors; "" for none."""

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Trace:
    """A span's context: the ids of its trace, of itself and of its parent, 0 for none."""

    trace_id: int
    span_id: int
    parent_id: int = 0

    @property
    def hex(self) -> str:
        """The trace id in hexadecimal."""
        return f"{self.trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """The W3C header with which others make their spans children of this one."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"

    def child(self, span_id: int = 0) -> Trace:
        """Return the context of a child. span_id: its id; 0: a random one."""
        return Trace(self.trace_id, span_id or secrets.randbits(64) or 1, self.span_id)


def place_of(traceparent: str) -> Trace | None:
    """Return the span that a `traceparent` names, None if it is invalid or not sampled."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or not int(found[3], 16) & 1 or not int(found[1], 16) or not int(found[2], 16):
        return None
    return Trace(int(found[1], 16), int(found[2], 16))


def run_place(traceparent: str, rid: str, epoch: int) -> Trace | None:
    """Return the context of a request's assignment, the same in every process; None if it is not traced."""
    parent = place_of(traceparent) if traceparent else None
    if parent is None:
        return None
    raw = blake2b(f"{traceparent}\0{rid}\0{epoch}".encode(), digest_size=8).digest()
    return parent.child(int.from_bytes(raw, "big") or 1)


class Tracer:
    """Exports spans to a collector, from a thread of its own."""

    def __init__(self, endpoint: str, service: str, instance: str, share: float) -> None:
        """endpoint: URL of OTLP over HTTP. share: fraction of requests without a `traceparent` to trace, 0 to 1.

        Raises BadRequest if OpenTelemetry is not installed.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk import trace as sdk
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError as error:
            raise BadRequest(f"--otlp-endpoint needs `pip install lorafleet[tracing]`: {error}") from error
        own = version("lorafleet")
        self._api: Any = trace
        self._sdk: Any = sdk
        self._share = share
        self.flush_s = FLUSH_S
        self._sampled: Any = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self._kinds: Any = {kind.name: kind for kind in trace.SpanKind}
        self._scope: Any = InstrumentationScope("lorafleet", own, SCHEMA_URL)
        self._resource: Any = Resource.create(
            {"service.name": f"lorafleet-{service}", "service.instance.id": instance, "service.version": own}
        )
        self._exporter: Any = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._processor: Any = BatchSpanProcessor(
            self._exporter, max_queue_size=MAX_WAITING, schedule_delay_millis=EXPORT_MS
        )

    def begin(self, traceparent: str) -> Trace | None:
        """Return the context of a new request, a child of the client's span; None if it is not traced."""
        if _TRACEPARENT.fullmatch(traceparent):  # the client has decided whether to sample
            above = place_of(traceparent)
            return above.child() if above is not None else None
        if secrets.randbelow(1 << 32) >= self._share * (1 << 32):
            return None
        return Trace(secrets.randbits(128) or 1, secrets.randbits(64) or 1)

    def tell(
        self, name: str, place: Trace, begin_ns: int, end_ns: int, attributes: Mapping[str, Any], *,
        kind: str = "INTERNAL", error: str = "", links: Sequence[Trace] = (), events: Sequence[tuple[str, int]] = (),
    ) -> None:  # fmt: skip
        """Export an ended span. Times are unix ns. kind: a `SpanKind`. error: why it failed, "" for success.

        events: (name, unix ns) of moments in the span.
        """
        api, sdk = self._api, self._sdk
        status = api.Status(api.StatusCode.ERROR, error[:200]) if error else api.Status(api.StatusCode.UNSET)
        # Created as already ended. The library's way, beginning and ending a span with a tracer, takes four times as
        # long.
        span = sdk.ReadableSpan(
            name, self._context(place.trace_id, place.span_id),
            self._context(place.trace_id, place.parent_id) if place.parent_id else None,
            self._resource, attributes, [sdk.Event(event, timestamp=at_ns) for event, at_ns in events],
            [api.Link(self._context(link.trace_id, link.span_id)) for link in links], self._kinds[kind],
            status=status, start_time=begin_ns, end_time=max(begin_ns, end_ns), instrumentation_scope=self._scope,
        )  # fmt: skip
        self._processor.on_end(span)

    def _context(self, trace_id: int, span_id: int) -> Any:
        return self._api.SpanContext(trace_id, span_id, is_remote=False, trace_flags=self._sampled)

    def close(self) -> None:
        """Export queued spans, for at most `FLUSH_S`, and stop the thread."""
        # The library's own shutdown waits for half a minute for a collector that does not respond.
        ending = threading.Thread(target=self._processor.shutdown, daemon=True)
        ending.start()
        ending.join(self.flush_s)
        if ending.is_alive():
            self._exporter.shutdown()  # otherwise its thread would keep trying


@dataclass(slots=True)
class Tracing:
    """The tracer of this process, None while tracing is off."""

    tracer: Tracer | None = None


TRACING = Tracing()


@contextmanager
def tracing(settings: Settings, service: str, instance: str) -> Generator[None]:
    """Enable tracing for the block, if the settings ask for it and this process has not enabled it already.

    Raises BadRequest if OpenTelemetry is not installed.
    """
    if not settings.otlp_endpoint or TRACING.tracer is not None:
        yield
        return
    TRACING.tracer = tracer = Tracer(settings.otlp_endpoint, service, instance, settings.trace_share)
    try:
        yield
    finally:
        TRACING.tracer = None
        tracer.close()
