"""Metrics of calls, under our names and LoRAX's, and the same numbers over time for charts.

Who answers and who asks are labels too, as long as they are among the most used: see `protocol.metrics.names`.
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
"""What `GET /v1/timeseries` shows: of this process, as the metrics."""

MERGES = "merged"
"""Name of all adapters that calls have merged of others."""

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
"""Name -> (metric, other labels) -> the series, which prometheus_client would look for under a lock each time."""

ADAPTERS.on_drop = TENANTS.on_drop = lambda name: _CHILDREN.pop(name, None)


for _kind in (series.KIND_BASE, series.KIND_ADAPTER):  # at 0, so that Prometheus sees their first calls
    for _metric in (series.PROMPT_TOKENS, series.OUTPUT_TOKENS, series.FIRST_TOKEN_SECONDS):
        _metric.labels(_kind)

_TIERS = {"staged": "store", "resident": "host"}
"""What happened to an adapter -> where it came from."""

MAX_NAMES = 4096
_NAMES: dict[str, str] = {}  # digest -> a name by which it was asked for; the one learnt first leaves first


def name_of_digest(digest: str) -> str | None:
    """Return a name by which an adapter was asked for here, None if it was not lately."""
    return _NAMES.get(digest)


def name_of(target: CallTarget) -> str:
    """Return the label of the answering model."""
    return MERGES if is_merge(target.digest) else target.name


def kind_of(digest: str) -> str:
    """Return a metric's label of the answering model: an adapter, or the base."""
    return series.KIND_ADAPTER if digest else series.KIND_BASE


@cache
def _child(metric: Counter | Histogram, label: str) -> Any:
    """Return a metric's child of a label."""
    return metric.labels(label)


def _named(metric: Counter | Histogram, name: str, *labels: str) -> Any:
    """Return a metric's child of a name that `TopNames` has chosen, and of labels with few values."""
    children = _CHILDREN.setdefault(name, {})
    child = children.get((metric, *labels))
    if child is None:
        child = children[metric, *labels] = metric.labels(name, *labels)
    return child


def accepted(tenant: str, prompts: Sequence[Prompt]) -> None:
    """Count a call that is in the queue. tenant: who asks."""
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
    """Count a 429. tenant: who asked, "" where that was not asked yet; reason: what there was too much of."""
    _named(series.TENANT_REFUSED, TENANTS.of(tenant), reason).inc()
    SERIES.count(tenant, "", "refused")


def answered(tenant: str, status: int) -> None:
    """Count a call's HTTP status if it is an error other than 429."""
    if status >= 500:
        SERIES.count(tenant, "", "server_errors")
    elif status >= 400 and status != 429:
        SERIES.count(tenant, "", "client_errors")


def placed(tenant: str, target: CallTarget, timing: m.Timing) -> None:
    """Count a request's assignment to a worker, once it has emitted something there."""
    _named(series.TENANT_QUEUE_SECONDS, TENANTS.of(tenant)).observe(timing.queued_ms / 1000)
    if timing.tier:
        adapter = ADAPTERS.of(name_of(target))
        _named(series.ADAPTER_USES, adapter, timing.tier).inc()
        SERIES.count(tenant, name_of(target), "hits" if timing.tier == "resident" else "misses")
        if timing.ready_ms >= 0:
            _named(series.ADAPTER_WAIT_SECONDS, adapter, timing.tier).observe(timing.ready_ms / 1000)


def adapter_event(event: m.AdapterEvent) -> None:
    """Count an adapter's fetch to a worker, or load into its pool. Names are known for recently requested adapters."""
    tier = _TIERS.get(event.kind)
    if tier is not None:
        name = MERGES if is_merge(event.digest) else _NAMES.get(event.digest, OTHER)
        _named(series.ADAPTER_LOAD_SECONDS, ADAPTERS.shown(name), tier).observe(event.ms / 1000)


def first_token(tenant: str, target: CallTarget, seconds: float, trace_id: str = "") -> None:
    """Note how long a call waited for its first token. trace_id: of its trace, "" without one."""
    exemplar = {"trace_id": trace_id} if trace_id else None
    _child(series.FIRST_TOKEN_SECONDS, kind_of(target.digest)).observe(seconds, exemplar)
    name = name_of(target)
    _named(series.ADAPTER_FIRST_TOKEN_SECONDS, ADAPTERS.of(name)).observe(seconds, exemplar)
    SERIES.first_token(tenant, name, seconds)


def choice_ended(finish: str) -> None:
    """Count a choice that came to an end, and how."""
    _child(series.GENERATIONS, finish).inc()


def left(tenant: str, target: CallTarget, num_tokens: int) -> None:
    """Count the output tokens of a choice that nobody follows any more."""
    _child(series.OUTPUT_TOKENS, kind_of(target.digest)).inc(num_tokens)
    name = name_of(target)
    _named(series.ADAPTER_TOKENS, ADAPTERS.of(name), "output").inc(num_tokens)
    _named(series.TENANT_TOKENS, TENANTS.of(tenant), "output").inc(num_tokens)
    SERIES.count(tenant, name, "output_tokens", num_tokens)


def succeeded(kind: str, seconds: float, num_tokens: int, trace_id: str = "") -> None:
    """Count a call that came to its end."""
    _child(series.CALL_SECONDS, kind).observe(seconds, {"trace_id": trace_id} if trace_id else None)
    lorax_metrics.succeeded(seconds, num_tokens)


def client_gone() -> None:
    """Count a call whose client hung up."""
    series.CLIENTS_GONE.inc()
    lorax_metrics.failed("dropped")


def cut_off(tenant: str) -> None:
    """Count an answer that failed once it had begun."""
    SERIES.count(tenant, "", "server_errors")
    lorax_metrics.failed("incomplete")
