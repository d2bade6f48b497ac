"""A service's `/metrics`: Prometheus's text format, or OpenMetrics with exemplars on request."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

from prometheus_client import REGISTRY, Metric, start_http_server
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


class _Renamed(Collector):
    """All series, with LoRAX's counters under their original names, which do not end in _total.

    OpenMetrics does not allow such names for counters, so their type there is unknown; rates of them are correct
    anyway.
    """

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        for metric in REGISTRY.collect():
            if metric.type == "counter" and metric.name.startswith("lorax_"):
                plain = Metric(metric.name, metric.documentation, "unknown")
                plain.samples = [Sample(metric.name, sample.labels, sample.value) for sample in metric.samples]
                yield plain
            else:
                yield metric


_RENAMED = _Renamed()
_AS_THEY_ARE = openmetrics.ALLOWUTF8  # otherwise colons, as in vllm:num_requests_running, become underscores
_SUFFIXED = re.compile(rb"\b(lorax_[a-z_]+)_total\b")


def page(accept: str) -> tuple[bytes, str]:
    """Return this process's page and its content type, in the format that the `Accept` header requests."""
    if any(part.split(";")[0].strip() == "application/openmetrics-text" for part in accept.split(",")):
        write: Callable[[Collector, str], bytes] = cast("Any", openmetrics).generate_latest  # it is untyped
        return write(_RENAMED, _AS_THEY_ARE), openmetrics.CONTENT_TYPE_LATEST
    return _SUFFIXED.sub(rb"\1", generate_latest(REGISTRY, _AS_THEY_ARE)), CONTENT_TYPE_PLAIN_0_0_4


@contextmanager
def serve_metrics(port: int) -> Generator[None]:
    """Serve `GET /metrics` on `port` from a thread until the block ends; do nothing if `port` is 0."""
    if not port:
        yield
        return
    server, thread = start_http_server(port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
