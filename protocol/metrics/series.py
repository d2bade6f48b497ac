"""Every series that the fleet exports to Prometheus, with its help text and the service that exports it.

docs/metrics.md is generated from `DECLARED`, and a test checks dashboards and rules against it. Names include the unit.
A label with untrusted values, such as names of adapters and tenants, goes through `names.TopNames`, which bounds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram, Summary, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

disable_created_metrics()  # one more series for each counter and histogram, which no one reads

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_NAMED_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
"""Buckets of histograms per named adapter or tenant: fewer than `_LATENCY_S`, since there may be a thousand names."""


@dataclass(frozen=True, slots=True)
class Series:
    """One declared series."""

    name: str  # name in queries; for histograms without _bucket, _sum and _count
    kind: str  # counter, gauge, histogram or summary
    text: str
    labels: tuple[str, ...]
    shown_by: str  # kind of service that exports it


DECLARED: dict[str, Series] = {}
"""Every series by name, in the order of this module."""


class _Shown:
    """Declares the series of one kind of service."""

    def __init__(self, by: str) -> None:
        self._by = by

    def _declare(self, name: str, kind: str, text: str, labels: Sequence[str]) -> None:
        DECLARED[name] = Series(name, kind, text, tuple(labels), self._by)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        self._declare(name, "counter", text, labels)
        return Counter(name, text, labels)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        self._declare(name, "gauge", text, labels)
        return Gauge(name, text, labels)

    def summary(self, name: str, text: str) -> Summary:
        self._declare(name, "summary", text, ())
        return Summary(name, text)

    def histogram(
        self, name: str, text: str, labels: Sequence[str] = (), buckets: Sequence[float] = _LATENCY_S
    ) -> Histogram:
        self._declare(name, "histogram", text, labels)
        return Histogram(name, text, labels, buckets=buckets)

    def family(self, name: str, kind: str, text: str, labels: Sequence[str] = ()) -> Family:
        """Declare a series that a collector computes at each scrape."""
        self._declare(name, kind, text, labels)
        return Family(DECLARED[name])


@dataclass(frozen=True, slots=True)
class Family:
    """A declared series without values; each method creates an empty one, to be filled and exported."""

    series: Series

    def total(self) -> CounterMetricFamily:
        """Return an empty counter."""
        return CounterMetricFamily(self.series.name, self.series.text, labels=self.series.labels)

    def now(self) -> GaugeMetricFamily:
        """Return an empty gauge."""
        return GaugeMetricFamily(self.series.name, self.series.text, labels=self.series.labels)

    def spread(self) -> HistogramMetricFamily:
        """Return an empty histogram."""
        return HistogramMetricFamily(self.series.name, self.series.text, labels=self.series.labels)


# ---------------------------------------------------------------- gateway

_gateway = _Shown("gateway")

HTTP_REQUESTS = _gateway.counter("lorafleet_http_requests_total", "HTTP responses.", ["route", "method", "status"])
HTTP_REQUESTS_OPEN = _gateway.gauge("lorafleet_http_requests_open", "HTTP requests being answered.")
GENERATIONS = _gateway.counter("lorafleet_generations_total", "Finished choices, by finish reason.", ["finish"])
PROMPT_TOKENS = _gateway.counter("lorafleet_prompt_tokens_total", "Prompt tokens of accepted calls.", ["kind"])
OUTPUT_TOKENS = _gateway.counter("lorafleet_output_tokens_total", "Tokens delivered to clients.", ["kind"])
FIRST_TOKEN_SECONDS = _gateway.histogram(
    "lorafleet_time_to_first_token_seconds", "From a call's admission to its first token.", ["kind"]
)
CALL_SECONDS = _gateway.histogram("lorafleet_call_seconds", "From a call's admission to its last token.", ["kind"])
HTTP_DROPPED = _gateway.counter(
    "lorafleet_http_dropped_total", "Connections dropped or refused because of their clients' behaviour.", ["reason"]
)
CLIENTS_GONE = _gateway.counter("lorafleet_clients_gone_total", "Calls whose client left before the end.")
GATEWAY_LOG_READS = _gateway.counter("lorafleet_gateway_log_reads_total", "Times a call read its tokens from the log.")
HISTORY_LOST = _gateway.counter(
    "lorafleet_history_lost_total",
    "What the history's database misses: requests, texts (prompts and outputs), gaps of unknown length.",
    ["what"],
)
HISTORY_BEHIND = _gateway.gauge(
    "lorafleet_history_behind_seconds", "Age of the oldest ended request that the history's database does not have."
)
GATEWAY_HELD_BYTES = _gateway.gauge("lorafleet_gateway_held_bytes", "Bytes of memory that calls are charged for here.")
GATEWAY_STALE_DELTAS = _gateway.counter("lorafleet_gateway_stale_deltas_total", "Deltas without a waiting call.")

# ---------------------------------------------------------------- gateway, by adapter and by tenant

ADAPTER_REQUESTS = _gateway.counter(
    "lorafleet_adapter_requests_total", "Requests that were queued, by the model that answers.", ["adapter"]
)
ADAPTER_TOKENS = _gateway.counter(
    "lorafleet_adapter_tokens_total", "Prompt tokens queued, and output tokens delivered.", ["adapter", "kind"]
)
ADAPTER_FIRST_TOKEN_SECONDS = _gateway.histogram(
    "lorafleet_adapter_first_token_seconds", "From a call's admission to its first token.", ["adapter"], _NAMED_S
)
ADAPTER_USES = _gateway.counter(
    "lorafleet_adapter_uses_total",
    "Requests that reached a worker, by their adapter's location: resident is a hit, anything else a miss.",
    ["adapter", "tier"],
)
ADAPTER_WAIT_SECONDS = _gateway.histogram(
    "lorafleet_adapter_wait_seconds",
    "Time requests waited on their worker for their adapter, by its location; part of the time to first token.",
    ["adapter", "tier"],
    _NAMED_S,
)
ADAPTER_LOAD_SECONDS = _gateway.histogram(
    "lorafleet_adapter_load_seconds",
    "Load time of adapters on all workers: from the store to host memory (store), and from host memory into the pool"
    " (host). Every gateway counts all.",
    ["adapter", "tier"],
    _NAMED_S,
)
TENANT_TOKENS = _gateway.counter(
    "lorafleet_tenant_tokens_total", "Prompt tokens queued, and output tokens delivered.", ["tenant", "kind"]
)
TENANT_REFUSED = _gateway.counter(
    "lorafleet_tenant_refused_total", "Calls refused with 429, by the limit that was exceeded.", ["tenant", "reason"]
)
TENANT_QUEUE_SECONDS = _gateway.histogram(
    "lorafleet_tenant_queue_seconds", "From submission to the latest assignment.", ["tenant"], _NAMED_S
)

# ---------------------------------------------------------------- gateway, under LoRAX's names and with its buckets

_lorax = _Shown("gateway, as LoRAX")
_LORAX_S = tuple(0.00015 * 1.5**i for i in range(35))
_LORAX_TOKENS = tuple(1 << i for i in range(21))

LORAX_COUNT = _lorax.counter("lorax_request_count", "Generations requested.")
LORAX_SUCCESS = _lorax.counter("lorax_request_success", "Generations completed.")
LORAX_FAILURE = _lorax.counter("lorax_request_failure", "Generations that failed, by cause.", ["err"])
LORAX_SECONDS = _lorax.histogram(
    "lorax_request_duration", "Seconds from a request to the end of its response.", buckets=_LORAX_S
)
LORAX_VALIDATION_SECONDS = _lorax.histogram(
    "lorax_request_validation_duration", "Seconds before submission, native routes.", buckets=_LORAX_S
)
LORAX_QUEUE_SECONDS = _lorax.histogram(
    "lorax_request_queue_duration", "Seconds queued, native routes.", buckets=_LORAX_S
)
LORAX_INFERENCE_SECONDS = _lorax.histogram(
    "lorax_request_inference_duration", "Seconds with a worker, native routes.", buckets=_LORAX_S
)
LORAX_TOKEN_SECONDS = _lorax.histogram(
    "lorax_request_mean_time_per_token_duration", "Seconds per token of a call.", buckets=_LORAX_S
)
LORAX_INPUT_LENGTH = _lorax.histogram("lorax_request_input_length", "Prompt tokens.", buckets=_LORAX_TOKENS)
LORAX_MAX_NEW = _lorax.histogram("lorax_request_max_new_tokens", "Maximum output tokens.", buckets=_LORAX_TOKENS)
LORAX_GENERATED = _lorax.histogram("lorax_request_generated_tokens", "Output tokens.", buckets=_LORAX_TOKENS)
LORAX_INPUT_COUNT = _lorax.summary("lorax_request_input_count", "Prompts of a call.")
LORAX_QUEUE_LENGTH = _lorax.gauge("lorax_queue_length", "Requests waiting for a worker.")
LORAX_BATCH_SIZE = _lorax.gauge("lorax_batch_current_size", "Requests running on workers.")

# ---------------------------------------------------------------- the fleet, as the leading scheduler reports it

_fleet = _Shown("gateway, of the fleet")

FLEET_QUEUED = _fleet.gauge("lorafleet_queued_requests", "Requests waiting for a worker.")
FLEET_RUNNING = _fleet.gauge("lorafleet_running_requests", "Requests assigned to workers.")
FLEET_WORKERS = _fleet.gauge("lorafleet_workers", "Workers alive.")
BASE_LOAD = _fleet.gauge(
    "lorafleet_base_load",
    "Of a base in a fleet with several: its workers, its requests that wait (queued) or run (running), and what workers"
    " are needed for (demand): both, and at least 1 until its first worker has come up.",
    ["base", "what"],
)
FLEET_OLDEST_SECONDS = _fleet.gauge(
    "lorafleet_oldest_queued_seconds", "Age of the oldest queued request, by class.", ["class"]
)
FLEET_DEAD_LETTERS = _fleet.gauge("lorafleet_dead_letters", "Dead letters: requests that failed too often.")
FLEET_HAS_LEADER = _fleet.gauge("lorafleet_has_leader", "1 while a scheduler is leader, else 0.")
FLEET_LEADER_EPOCH = _fleet.gauge("lorafleet_leader_epoch", "Leader epoch: increases with each new leader.")
QUEUE_USED_BYTES = _fleet.gauge("lorafleet_queue_used_bytes", "Memory used by the queue's server.")
QUEUE_MAX_BYTES = _fleet.gauge("lorafleet_queue_max_bytes", "Memory limit of the queue's server; 0: no limit.")
QUEUE_ANSWER_SECONDS = _fleet.histogram(
    "lorafleet_queue_answer_seconds",
    "Round-trip time to the queue's server, measured once a second.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
)

# ---------------------------------------------------------------- workers, by their last heartbeats

PHASES = ("plan", "draft", "inputs", "forward", "sample", "finish", "publish")
"""Phases of a step's time; publishing runs beside the next steps."""

TOKEN_KINDS = ("computed", "cached", "output", "drafted", "accepted", "model_drafted", "model_accepted")
"""Kinds of tokens that workers count."""

_worker = _Shown("gateway and worker")

WORKER_STEPS = _worker.family("lorafleet_worker_steps_total", "counter", "Steps computed.", ["worker"])
WORKER_PHASE_SECONDS = _worker.family(
    "lorafleet_worker_phase_seconds_total", "counter", "Time that steps took, by phase.", ["worker", "phase"]
)
WORKER_TOKENS = _worker.family(
    "lorafleet_worker_tokens_total",
    "counter",
    "Tokens computed, found in the prefix cache, output, drafted, accepted, and the last two of the draft model.",
    ["worker", "kind"],
)
WORKER_PREEMPTIONS = _worker.family(
    "lorafleet_worker_preemptions_total", "counter", "Preemptions of requests.", ["worker"]
)
WORKER_ADAPTER_EVENTS = _worker.family(
    "lorafleet_worker_adapter_events_total",
    "counter",
    "Adapters fetched, loaded into the pool, and evicted from it.",
    ["worker", "event"],
)
WORKER_LOAD_SECONDS = _worker.family(
    "lorafleet_worker_adapter_load_seconds",
    "histogram",
    "Load time of adapters: from the store to host memory (store), and from host memory into the pool (host).",
    ["worker", "tier"],
)
WORKER_REQUESTS = _worker.family(
    "lorafleet_worker_requests", "gauge", "Requests it holds, by state.", ["worker", "state"]
)
WORKER_KV_BLOCKS = _worker.family("lorafleet_worker_kv_blocks", "gauge", "KV blocks, by state.", ["worker", "state"])
WORKER_KV_BYTES = _worker.family(
    "lorafleet_worker_kv_bytes", "gauge", "Memory for keys and values, by state.", ["worker", "state"]
)
WORKER_POOL_BYTES = _worker.family(
    "lorafleet_worker_adapter_pool_bytes", "gauge", "Memory for resident adapters, by state.", ["worker", "state"]
)
WORKER_HOST_BYTES = _worker.family(
    "lorafleet_worker_adapter_host_bytes", "gauge", "Host memory for packed adapters, by state.", ["worker", "state"]
)
WORKER_RESIDENT = _worker.family("lorafleet_worker_resident_adapters", "gauge", "Adapters in the pool.", ["worker"])

# ---------------------------------------------------------------- residency, and vLLM's names, with `vllm_metrics`

_residency = _Shown("gateway, with vllm_metrics")

ADAPTER_LOADED = _residency.family(
    "lorafleet_adapter_loaded",
    "gauge",
    "1 for each adapter that a worker has, with where (resident, loading, host), whether it is pinned, and its rank.",
    ["worker", "adapter", "level", "pinned", "rank"],
)
VLLM_LORA_LOADED = _residency.family(
    "vllm:lora_adapter_loaded",
    "gauge",
    "As lorafleet_adapter_loaded, under a name that other tools expect.",
    ["worker", "lora_name", "level", "pinned", "rank"],
)
VLLM_RUNNING = _residency.family(
    "vllm:num_requests_running", "gauge", "Requests running, or about to run.", ["model_name"]
)
VLLM_WAITING = _residency.family(
    "vllm:num_requests_waiting", "gauge", "Requests waiting for a worker, or at one for their adapter.", ["model_name"]
)
VLLM_WAITING_BY_REASON = _residency.family(
    "vllm:num_requests_waiting_by_reason",
    "gauge",
    "Those of vllm:num_requests_waiting: for a worker (capacity), at one for their adapter (deferred).",
    ["model_name", "reason"],
)
VLLM_KV_USAGE = _residency.family(
    "vllm:kv_cache_usage_perc", "gauge", "Fraction of all workers' KV blocks in use, 0 to 1.", ["model_name"]
)
VLLM_ITERATION_TOKENS = _residency.family(
    "vllm:iteration_tokens_total",
    "histogram",
    "Tokens of prompts and outputs in a step.",
    ["model_name"],
)
VLLM_LORA_INFO = _residency.family(
    "vllm:lora_requests_info",
    "gauge",
    "Unix seconds; the labels name the adapters of running and of waiting requests, and how many fit the pools.",
    ["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
)

# ---------------------------------------------------------------- scheduler

_scheduler = _Shown("scheduler")

SCHEDULER_LEADS = _scheduler.gauge("lorafleet_scheduler_leads", "1 in the scheduler that leads, 0 in a standby.")
ASSIGNED = _scheduler.counter("lorafleet_assigned_requests_total", "Requests assigned to workers.", ["adapter"])
QUEUE_SECONDS = _scheduler.histogram("lorafleet_queue_seconds", "From submission to assignment.")
PLAN_SECONDS = _scheduler.histogram(
    "lorafleet_plan_seconds", "Time of a placement decision.", buckets=(1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
)
WORKERS_LOST = _scheduler.counter("lorafleet_workers_lost_total", "Workers declared dead.")
SWAPS = _scheduler.counter(
    "lorafleet_swaps_total",
    "Orders to workers to become a base: done, failed (the base does not start), lost (the worker ended first).",
    ["base", "outcome"],
)
REQUEUED = _scheduler.counter("lorafleet_requeued_requests_total", "Requests taken from dead workers.", ["outcome"])

# ---------------------------------------------------------------- adapter store

_store = _Shown("store")

STORE_BLOBS = _store.gauge("lorafleet_store_blobs", "Adapters on the store's disk.")
STORE_BYTES = _store.gauge("lorafleet_store_bytes", "Bytes of the adapters on the store's disk.")
STORE_NAMES = _store.gauge("lorafleet_store_names", "Names in the catalogue, by state.", ["state"])
STORE_FETCHES = _store.counter(
    "lorafleet_store_fetches_total", "Versions fetched from a source.", ["scheme", "outcome"]
)
STORE_FETCH_SECONDS = _store.histogram(
    "lorafleet_store_fetch_seconds", "From a version's resolution to its blob.", ["scheme"]
)

# ---------------------------------------------------------------- loops of every service

_service = _Shown("every service")

FAILURES = _service.counter("lorafleet_loop_failures_total", "Failures of loops, and of what they work on.", ["loop"])
GIVEN_UP = _service.counter("lorafleet_given_up_total", "Units of work given up after repeated failures.", ["loop"])
UNREADABLE = _service.counter("lorafleet_unreadable_records_total", "Unreadable records found in the queue.", ["kind"])

ADAPTER_THERE = "there"
ADAPTER_COMING = "coming"

KIND_BASE = "base"
KIND_ADAPTER = "adapter"
