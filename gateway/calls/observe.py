"""Metrics of calls, under this project's and LoRAX's names, and the same counts as time series for charts.

Adapter and tenant are labels too, for the most used names: see `protocol.metrics.names`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from prometheus_client import Counter, Histogram

from gateway.adapters.resolver import CallTarget
from gateway.calls import lorax_metrics
from gateway.calls.tokenize import Prompt
from gateway.fleet.timeseries import TimeSeries
from peft_adapters.recipe import is_merge
from protocol.metrics import series
from protocol.metrics.names import OTHER, TopNames
from protocol.wire import messages as m

SERIES = TimeSeries()
"""The time series behind `GET /v1/timeseries`. Like the metrics, they cover this process only."""

MERGES = "merged"
"""Label value shared by all merged adapters."""

ADAPTERS = TopNames(
    "adapter",
    series.ADAPTER_REQUESTS,
    series.ADAPTER_TOKENS,
    series.ADAPTER_FIRST_TOKEN_SECONDS,
    series.ADAPTER_USES,
    series.ADAPTER_WAIT_SECONDS,
    series.ADAPTER_LOAD_SECONDS,
)
TENANTS = TopNames("tenant", series.TENANT_TOKENS, series.TENANT_REFUSED, series.TENANT_QUEUE_SECONDS)

_CHILDREN: dict[str, dict[tuple[Any, ...], Any]] = {}
"""Name -> (metric, other labels) -> child metric. prometheus_client's own lookup takes a lock each time."""

ADAPTERS.on_drop = TENANTS.on_drop = lambda name: _CHILDREN.pop(name, None)


for _kind in (series.KIND_BASE, series.KIND_ADAPTER):  # at 0, so that Prometheus sees their first calls
    for _metric in (series.PROMPT_TOKENS, series.OUTPUT_TOKENS, series.FIRST_TOKEN_SECONDS):
        _metric.labels(_kind)

_TIERS = {"staged": "store", "resident": "host"}
"""Event of an adapter -> the tier it was loaded from."""

MAX_NAMES = 4096
_NAMES: dict[str, str] = {}  # digest -> a requested name; the oldest entry is evicted first


def name_of_digest(digest: str) -> str | None:
    """Return a name by which an adapter was recently requested from this process, None if it was not."""
    return _NAMES.get(digest)


def name_of(target: CallTarget) -> str:
    """Return the label of the answering model."""
    return MERGES if is_merge(target.digest) else target.name


def kind_of(digest: str) -> str:
    """Return the `kind` label of a target: adapter, or base if the digest is ""."""
    return series.KIND_ADAPTER if digest else series.KIND_BASE


@cache
def _child(metric: Counter | Histogram, label: str) -> Any:
    """Return a metric's child for a label value."""
    return metric.labels(label)


def _named(metric: Counter | Histogram, name: str, *labels: str) -> Any:
    """Return a metric's child for a name that `TopNames` has chosen and for labels with few values."""
    children = _CHILDREN.setdefault(name, {})
    child = children.get((metric, *labels))
    if child is None:
        child = children[metric, *labels] = metric.labels(name, *labels)
    return child


def accepted(tenant: str, prompts: Sequence[Prompt]) -> None:
    """Count a call that was queued. tenant: its owner."""
    who = TENANTS.of(tenant)
    for prompt in prompts:
        name = name_of(prompt.target)
        adapter = ADAPTERS.of(name)
        if prompt.target.digest and prompt.target.digest not in _NAMES:
            _NAMES[prompt.target.digest] = name
            if len(_NAMES) > MAX_NAMES:
                del _NAMES[next(iter(_NAMES))]
        _child(series.PROMPT_TOKENS, kind_of(prompt.target.digest)).inc(prompt.num_tokens)
        _named(series.ADAPTER_REQUESTS, adapter).inc()
        _named(series.ADAPTER_TOKENS, adapter, "prompt").inc(prompt.num_tokens)
        _named(series.TENANT_TOKENS, who, "prompt").inc(prompt.num_tokens)
        SERIES.queued(tenant, name, prompt.num_tokens)
    lorax_metrics.accepted([(prompt.num_tokens, prompt.max_new_tokens) for prompt in prompts])


def refused(tenant: str, reason: str) -> None:
    """Count a 429. tenant: "" if it was not determined; reason: the limit that was exceeded."""
    _named(series.TENANT_REFUSED, TENANTS.of(tenant), reason).inc()
    SERIES.count(tenant, "", "refused")


def answered(tenant: str, status: int) -> None:
    """Count a call's HTTP status if it is an error other than 429."""
    if status >= 500:
        SERIES.count(tenant, "", "server_errors")
    elif status >= 400 and status != 429:
        SERIES.count(tenant, "", "client_errors")


def placed(tenant: str, target: CallTarget, timing: m.Timing) -> None:
    """Count a request's assignment to a worker, once that worker has emitted something."""
    _named(series.TENANT_QUEUE_SECONDS, TENANTS.of(tenant)).observe(timing.queued_ms / 1000)
    if timing.tier:
        adapter = ADAPTERS.of(name_of(target))
        _named(series.ADAPTER_USES, adapter, timing.tier).inc()
        SERIES.count(tenant, name_of(target), "hits" if timing.tier == "resident" else "misses")
        if timing.ready_ms >= 0:
            _named(series.ADAPTER_WAIT_SECONDS, adapter, timing.tier).observe(timing.ready_ms / 1000)


def adapter_event(event: m.AdapterEvent) -> None:
    """Count an adapter's fetch to a worker or load into its pool. Only recently requested adapters have names here."""
    tier = _TIERS.get(event.kind)
    if tier is not None:
        name = MERGES if is_merge(event.digest) else _NAMES.get(event.digest, OTHER)
        _named(series.ADAPTER_LOAD_SECONDS, ADAPTERS.shown(name), tier).observe(event.ms / 1000)


def first_token(tenant: str, target: CallTarget, seconds: float, trace_id: str = "") -> None:
    """Observe the seconds until a call's first token. trace_id: id of its trace, "" without one."""
    exemplar = {"trace_id": trace_id} if trace_id else None
    _child(series.FIRST_TOKEN_SECONDS, kind_of(target.digest)).observe(seconds, exemplar)
    name = name_of(target)
    _named(series.ADAPTER_FIRST_TOKEN_SECONDS, ADAPTERS.of(name)).observe(seconds, exemplar)
    SERIES.first_token(tenant, name, seconds)


def choice_ended(finish: str) -> None:
    """Count a choice that has ended. finish: its finish reason."""
    _child(series.GENERATIONS, finish).inc()


def left(tenant: str, target: CallTarget, num_tokens: int) -> None:
    """Count the output tokens of a choice that is no longer followed."""
    _child(series.OUTPUT_TOKENS, kind_of(target.digest)).inc(num_tokens)
    name = name_of(target)
    _named(series.ADAPTER_TOKENS, ADAPTERS.of(name), "output").inc(num_tokens)
    _named(series.TENANT_TOKENS, TENANTS.of(tenant), "output").inc(num_tokens)
    SERIES.count(tenant, name, "output_tokens", num_tokens)


def succeeded(kind: str, seconds: float, num_tokens: int, trace_id: str = "") -> None:
    """Count a completed call. seconds: its duration; num_tokens: its output tokens."""
    _child(series.CALL_SECONDS, kind).observe(seconds, {"trace_id": trace_id} if trace_id else None)
    lorax_metrics.succeeded(seconds, num_tokens)


def client_gone() -> None:
    """Count a call whose client hung up."""
    series.CLIENTS_GONE.inc()
    lorax_metrics.failed("dropped")


def cut_off(tenant: str) -> None:
    """Count an answer that failed after it had begun."""
    SERIES.count(tenant, "", "server_errors")
    lorax_metrics.failed("incomplete")
