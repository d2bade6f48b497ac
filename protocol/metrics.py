"""Every Prometheus metric, declared once. Units are in the names; adapters are never labels, there are too many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram, start_http_server

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# ---------------------------------------------------------------- gateway

HTTP_REQUESTS = Counter("lorafleet_http_requests_total", "HTTP responses.", ["route", "method", "status"])
HTTP_REQUESTS_OPEN = Gauge("lorafleet_http_requests_open", "HTTP requests being answered.")
GENERATIONS = Counter("lorafleet_generations_total", "Choices that have ended, by reason.", ["finish"])
PROMPT_TOKENS = Counter("lorafleet_prompt_tokens_total", "Prompt tokens of accepted calls.", ["kind"])
OUTPUT_TOKENS = Counter("lorafleet_output_tokens_total", "Tokens delivered to clients.", ["kind"])
FIRST_TOKEN_SECONDS = Histogram(
    "lorafleet_time_to_first_token_seconds", "From a call's admission to its first token.", ["kind"], buckets=_LATENCY_S
)
CALL_SECONDS = Histogram(
    "lorafleet_call_seconds", "From a call's admission to its last token.", ["kind"], buckets=_LATENCY_S
)
CLIENTS_GONE = Counter("lorafleet_clients_gone_total", "Calls whose client left before the end.")
GATEWAY_LOG_READS = Counter("lorafleet_gateway_log_reads_total", "Times a call read its tokens from the log.")
GATEWAY_STALE_DELTAS = Counter("lorafleet_gateway_stale_deltas_total", "Deltas that nobody waited for.")

# ---------------------------------------------------------------- the fleet, as the leading scheduler reports it

FLEET_QUEUED = Gauge("lorafleet_queued_requests", "Requests waiting for a worker.")
FLEET_RUNNING = Gauge("lorafleet_running_requests", "Requests assigned to workers.")
FLEET_WORKERS = Gauge("lorafleet_workers", "Workers alive.")

# ---------------------------------------------------------------- scheduler

SCHEDULER_LEADS = Gauge("lorafleet_scheduler_leads", "1 in the scheduler that leads, 0 in a standby.")
ASSIGNED = Counter("lorafleet_assigned_requests_total", "Requests given to workers.", ["adapter"])
QUEUE_SECONDS = Histogram("lorafleet_queue_seconds", "From submission to assignment.", buckets=_LATENCY_S)
PLAN_SECONDS = Histogram(
    "lorafleet_plan_seconds", "Time to decide what goes where.", buckets=(1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
)
WORKERS_LOST = Counter("lorafleet_workers_lost_total", "Workers found dead.")
REQUEUED = Counter("lorafleet_requeued_requests_total", "Requests taken from dead workers.", ["outcome"])

# ---------------------------------------------------------------- adapter store

STORE_BLOBS = Gauge("lorafleet_store_blobs", "Adapters on the store's disk.")
STORE_BYTES = Gauge("lorafleet_store_bytes", "Bytes of the adapters on the store's disk.")
STORE_NAMES = Gauge("lorafleet_store_names", "Names in the catalogue, by state.", ["state"])
STORE_FETCHES = Counter("lorafleet_store_fetches_total", "Versions fetched from a source.", ["scheme", "outcome"])
STORE_FETCH_SECONDS = Histogram(
    "lorafleet_store_fetch_seconds", "From a version's resolution to its blob.", ["scheme"], buckets=_LATENCY_S
)

ADAPTER_THERE = "there"
ADAPTER_COMING = "coming"

KIND_BASE = "base"
KIND_ADAPTER = "adapter"


@contextmanager
def serve_metrics(port: int) -> Iterator[None]:
    """Answer `GET /metrics` on a port, in a thread, until the block is left; on none if `port` is 0."""
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
