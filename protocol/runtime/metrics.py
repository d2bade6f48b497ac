"""Every Prometheus metric, declared once. Units are in the names; adapters are never labels, there are too many."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Metric, Summary, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from protocol.wire.messages import WorkerBeat

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
HTTP_DROPPED = Counter(
    "lorafleet_http_dropped_total", "Connections dropped, or not taken, for what their clients did.", ["reason"]
)
CLIENTS_GONE = Counter("lorafleet_clients_gone_total", "Calls whose client left before the end.")
GATEWAY_LOG_READS = Counter("lorafleet_gateway_log_reads_total", "Times a call read its tokens from the log.")
GATEWAY_HELD_BYTES = Gauge("lorafleet_gateway_held_bytes", "Bytes of memory that calls are charged for here.")
GATEWAY_STALE_DELTAS = Counter("lorafleet_gateway_stale_deltas_total", "Deltas that nobody waited for.")

# ---------------------------------------------------------------- gateway, under LoRAX's names and with its buckets

_LORAX_S = tuple(0.00015 * 1.5**i for i in range(35))
_LORAX_TOKENS = tuple(1 << i for i in range(21))

LORAX_COUNT = Counter("lorax_request_count", "Generations that were asked for.")
LORAX_SUCCESS = Counter("lorax_request_success", "Generations that came to their end.")
LORAX_FAILURE = Counter("lorax_request_failure", "Generations that failed, by cause.", ["err"])
LORAX_SECONDS = Histogram("lorax_request_duration", "Seconds from a request to its answer's end.", buckets=_LORAX_S)
LORAX_VALIDATION_SECONDS = Histogram(
    "lorax_request_validation_duration", "Seconds before submission, native routes.", buckets=_LORAX_S
)
LORAX_QUEUE_SECONDS = Histogram("lorax_request_queue_duration", "Seconds queued, native routes.", buckets=_LORAX_S)
LORAX_INFERENCE_SECONDS = Histogram(
    "lorax_request_inference_duration", "Seconds with a worker, native routes.", buckets=_LORAX_S
)
LORAX_TOKEN_SECONDS = Histogram(
    "lorax_request_mean_time_per_token_duration", "Seconds per token of a call.", buckets=_LORAX_S
)
LORAX_INPUT_LENGTH = Histogram("lorax_request_input_length", "Tokens of a prompt.", buckets=_LORAX_TOKENS)
LORAX_MAX_NEW = Histogram("lorax_request_max_new_tokens", "Tokens a request may make.", buckets=_LORAX_TOKENS)
LORAX_GENERATED = Histogram("lorax_request_generated_tokens", "Tokens of an answer.", buckets=_LORAX_TOKENS)
LORAX_INPUT_COUNT = Summary("lorax_request_input_count", "Prompts of a call.")
LORAX_QUEUE_LENGTH = Gauge("lorax_queue_length", "Requests waiting for a worker.")
LORAX_BATCH_SIZE = Gauge("lorax_batch_current_size", "Requests that workers run.")

# ---------------------------------------------------------------- the fleet, as the leading scheduler reports it

FLEET_QUEUED = Gauge("lorafleet_queued_requests", "Requests waiting for a worker.")
FLEET_RUNNING = Gauge("lorafleet_running_requests", "Requests assigned to workers.")
FLEET_WORKERS = Gauge("lorafleet_workers", "Workers alive.")
QUEUE_USED_BYTES = Gauge("lorafleet_queue_used_bytes", "Memory that the queue's server uses.")
QUEUE_MAX_BYTES = Gauge("lorafleet_queue_max_bytes", "Memory that the queue's server may use; 0: no limit.")

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

# ---------------------------------------------------------------- workers, by their last heartbeats

PHASES = ("plan", "inputs", "forward", "sample", "finish", "publish")
"""Phases of a step's time; publishing runs beside the next steps."""


class Workers(Collector):
    """The workers' metrics, by their heartbeats. Gateways show all workers, a worker's own port shows that one."""

    def __init__(self) -> None:
        self._beats: list[WorkerBeat] = []

    def show(self, beats: Iterable[WorkerBeat]) -> None:
        """Show these workers from now on; of two with the same name the one that beat last."""
        self._beats = list({beat.name: beat for beat in sorted(beats, key=lambda beat: beat.sent_ms)}.values())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics for Prometheus; none while no worker is shown."""
        if not self._beats:
            return
        steps = _total("steps", "Steps computed.")
        seconds = _total("phase_seconds", "Time that steps took, by phase.", "phase")
        tokens = _total("tokens", "Tokens computed, found in the prefix cache, output, drafted, accepted.", "kind")
        preemptions = _total("preemptions", "Requests that lost their KV blocks to others.")
        adapters = _total("adapter_events", "Adapters fetched, loaded into the pool, and evicted from it.", "event")
        requests = _now("requests", "Requests it holds, by state.", "state")
        blocks = _now("kv_blocks", "KV blocks, by state.", "state")
        pool = _now("adapter_pool_bytes", "Memory for resident adapters, by state.", "state")
        resident = _now("resident_adapters", "Adapters in the pool.")
        for beat in self._beats:
            name, counters = beat.name, beat.counters
            steps.add_metric([name], counters.num_steps)
            for phase in PHASES:
                seconds.add_metric([name, phase], getattr(counters, f"{phase}_s"))
            for kind in ("computed", "cached", "output", "drafted", "accepted"):
                tokens.add_metric([name, kind], getattr(counters, f"num_{kind}_tokens"))
            preemptions.add_metric([name], counters.num_preemptions)
            events = {"fetch": beat.num_fetches, "load": beat.num_loads, "eviction": counters.num_evictions}
            for event, num in events.items():
                adapters.add_metric([name, event], num)
            requests.add_metric([name, "running"], beat.running)
            requests.add_metric([name, "waiting"], beat.waiting)
            blocks.add_metric([name, "free"], beat.kv_blocks_free)
            blocks.add_metric([name, "used"], beat.kv_blocks_total - beat.kv_blocks_free)
            pool.add_metric([name, "free"], beat.pool_bytes_free)
            pool.add_metric([name, "used"], beat.pool_bytes_total - beat.pool_bytes_free)
            resident.add_metric([name], len(beat.resident))
        yield from (steps, seconds, tokens, preemptions, adapters, requests, blocks, pool, resident)


def _total(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"lorafleet_worker_{name}", text, labels=["worker", *labels])


def _now(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lorafleet_worker_{name}", text, labels=["worker", *labels])


WORKERS = Workers()
REGISTRY.register(WORKERS)

ADAPTER_THERE = "there"
ADAPTER_COMING = "coming"

KIND_BASE = "base"
KIND_ADAPTER = "adapter"


@contextmanager
def serve_metrics(port: int) -> Generator[None]:
    """Answer `GET /metrics` on `port` in a thread until the block is left; do nothing if `port` is 0."""
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
