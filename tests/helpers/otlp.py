"""A minimal OpenTelemetry span collector: receives OTLP over HTTP and decodes it with the official protobufs."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from helpers.stub_http import serving


@dataclass(frozen=True, slots=True)
class Span:
    """A received span."""

    service: str
    name: str
    trace: str
    id: str
    parent: str  # "" for none
    begin_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: list[str]  # ids of spans
    error: str
    schema: str
    kind: int


@dataclass(slots=True)
class Collector:
    """The spans received so far."""

    url: str
    spans: list[Span] = field(default_factory=list)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def beginning(self, text: str) -> list[Span]:
        return [span for span in self.spans if span.name.startswith(text)]


@contextmanager
def collecting() -> Iterator[Collector]:
    """Collect spans on a free port of this machine during the block."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                raw = gzip.decompress(raw)
            assert self.path == "/v1/traces"
            collector.spans += list(_spans(ExportTraceServiceRequest.FromString(raw)))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with serving(Handler) as url:
        collector = Collector(url)
        yield collector


def _spans(request: Any) -> Iterator[Span]:
    for of_resource in request.resource_spans:
        service = next(a.value.string_value for a in of_resource.resource.attributes if a.key == "service.name")
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                attributes = {a.key: _value(a.value) for a in span.attributes}
                yield Span(
                    service, span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
                    span.start_time_unix_nano, span.end_time_unix_nano, attributes,
                    [link.span_id.hex() for link in span.links],
                    span.status.message if span.status.code == 2 else "", of_scope.schema_url, span.kind,
                )  # fmt: skip


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def drawn(spans: list[Span], width: int = 56) -> str:
    """Return a trace as text: a tree of spans with their times, each with a bar on the scale of the whole trace."""
    begin, end = min(s.begin_ns for s in spans), max(s.end_ns for s in spans)
    ids = {span.id: span for span in spans}
    lines: list[str] = []

    def draw(span: Span, depth: int) -> None:
        left = round(width * (span.begin_ns - begin) / (end - begin))
        size = max(1, round(width * (span.end_ns - span.begin_ns) / (end - begin)))
        bar = (" " * min(left, width - 1) + "█" * size)[: width + 1]
        links = f"  ↩ {', '.join(ids[link].name for link in span.links if link in ids)}" if span.links else ""
        text = f"{'  ' * depth}{span.name}"
        service = span.service.removeprefix("lorafleet-")
        ms = (span.end_ns - span.begin_ns) / 1e6
        error = f"  ✗ {span.error}" if span.error else ""
        lines.append(f"{text:<26}{service:<10}{ms:>8.1f} ms  |{bar:<{width + 1}}|{error}{links}")
        for child in sorted((s for s in spans if s.parent == span.id), key=lambda s: s.begin_ns):
            draw(child, depth + 1)

    for root in (span for span in spans if span.parent not in ids):
        draw(root, 0)
    return "\n".join(lines)
