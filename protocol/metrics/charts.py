"""PromQL for the console's charts: one query over the declared series for all charts of a range.

A gateway with the address of a Prometheus sends these queries (`gateway/books/prometheus.py`). Every gateway exports
the fleet's series in its /metrics, so queries take their `max`. Calls are counted by the gateway that serves them, so
their counts are added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from string import Template
from typing import Literal

from protocol.metrics.names import OTHER

FIELD = "field"
"""Label of a query's results: the name of a number; names in `FLEET` have the prefix `OF_FLEET`."""

OF_FLEET = "fleet:"

Group = Literal["tenant", "model"]


def _sum(selector: str) -> str:
    return f"sum by ($by) (increase({selector}[$w]))"


def _quantile(share: float, name: str) -> str:
    return f"1000 * histogram_quantile({share}, sum by (le, $by) (rate({name}_bucket{{$m}}[$w])))"


def _workers(kind: str) -> str:
    return f'sum(max by (worker) (increase(lorafleet_worker_tokens_total{{kind="{kind}",$m}}[$w])))'


MODEL = {
    "requests": _sum("lorafleet_adapter_requests_total{$m}"),
    "prompt_tokens": _sum('lorafleet_adapter_tokens_total{kind="prompt",$m}'),
    "output_tokens": _sum('lorafleet_adapter_tokens_total{kind="output",$m}'),
    "hits": _sum('lorafleet_adapter_uses_total{tier="resident",$m}'),
    "misses": _sum('lorafleet_adapter_uses_total{tier!="resident",$m}'),
    "ttft_p50_ms": _quantile(0.5, "lorafleet_adapter_first_token_seconds"),
    "ttft_p95_ms": _quantile(0.95, "lorafleet_adapter_first_token_seconds"),
}
"""PromQL of each number of a model. `$w`: length of a period; `$m`: label matchers; `$by`: label to group by."""

TENANT = {
    "requests": _sum("lorafleet_tenant_queue_seconds_count{$m}"),
    "prompt_tokens": _sum('lorafleet_tenant_tokens_total{kind="prompt",$m}'),
    "output_tokens": _sum('lorafleet_tenant_tokens_total{kind="output",$m}'),
    "refused": _sum("lorafleet_tenant_refused_total{$m}"),
}
"""PromQL of each number of a tenant. Only requests that have reached a worker count."""

TOTAL = MODEL | {
    "requests": _sum("lorax_request_input_length_count{$m}"),
    "prompt_tokens": _sum("lorafleet_prompt_tokens_total{$m}"),
    "output_tokens": _sum("lorafleet_output_tokens_total{$m}"),
    "refused": TENANT["refused"],
    "client_errors": _sum('lorafleet_http_requests_total{method="POST",status=~"4..",status!="429",$m}'),
    "server_errors": _sum('lorafleet_http_requests_total{method="POST",status=~"5..",$m}'),
    "ttft_p50_ms": _quantile(0.5, "lorafleet_time_to_first_token_seconds"),
    "ttft_p95_ms": _quantile(0.95, "lorafleet_time_to_first_token_seconds"),
}
"""PromQL of each number of all calls. The errors are those of every POST.

Series with fixed labels start at 0 with their gateway. A series with a name starts with its first calls, which
Prometheus then counts in no period. So totals are not sums of named series where another series exists.
"""

FLEET = {
    "queued": "max(max_over_time(lorafleet_queued_requests{$m}[$w]))",
    "running": "max(max_over_time(lorafleet_running_requests{$m}[$w]))",
    "oldest_s": "max(max_over_time(lorafleet_oldest_queued_seconds{$m}[$w]))",
    "workers": "max(max_over_time(lorafleet_workers{$m}[$w]))",
    "output_tokens": _workers("output"),
    "computed_tokens": _workers("computed"),
    "cached_tokens": _workers("cached"),
}

GROUPS: Mapping[Group, tuple[str, Mapping[str, str]]] = {"model": ("adapter", MODEL), "tenant": ("tenant", TENANT)}
"""By group: the label with its names, and the numbers of each name."""


def busiest(group: Group, num: int, range_s: int, matchers: str) -> str:
    """Return the query for the names of a group with the most requests in the last `range_s` seconds, at most `num`."""
    label, numbers = GROUPS[group]
    named = f'{label}!="other",{matchers}'
    return f"topk({num}, {_filled(numbers['requests'], range_s, named, label)} > 0)"


def chart(group: Group | None, names: Sequence[str], step_s: int, matchers: str) -> str:
    """Return the query for all charts. Its results have the label `FIELD`; those of a group also have its label.

    names: tenants or models with charts of their own; all others are counted as `OTHER`. matchers: label matchers that
    select the fleet's series, "" for all series of the server.
    """
    found = [_labelled(name, _filled(text, step_s, matchers)) for name, text in TOTAL.items()]
    found += [_labelled(OF_FLEET + name, _filled(text, step_s, matchers)) for name, text in FLEET.items()]
    if group is not None:
        label, numbers = GROUPS[group]
        chosen = json.dumps("|".join(map(re.escape, names)), ensure_ascii=False)
        for name, text in numbers.items():
            found.append(_labelled(name, _filled(text, step_s, f"{label}=~{chosen},{matchers}", label)))
            if not name.startswith("ttft"):  # times to first token of a thousand names are slow to compute
                others = _filled(text, step_s, f"{label}!~{chosen},{matchers}")
                found.append(_labelled(name, f'label_replace({others}, "{label}", "{OTHER}", "", "")'))
    return " or ".join(found)


def _filled(text: str, window_s: int, matchers: str, by: str = "") -> str:
    return Template(text).substitute(w=f"{window_s}s", m=matchers, by=by)


def _labelled(name: str, text: str) -> str:
    return f'label_replace({text}, "{FIELD}", "{name}", "", "")'
