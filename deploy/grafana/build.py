"""Defines the dashboards, and generates their JSON for Grafana: `python deploy/grafana/build.py` rewrites it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. queries: legend -> query; a legend may contain labels in Grafana's syntax: {{worker}}."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    help: str = ""

    def json(self, index: int) -> dict[str, Any]:
        """Return the panel's JSON for Grafana, placed by its index: three panels per row."""
        is_table = self.kind == "table"
        targets = [
            {
                "refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": SOURCE,
                **({"instant": True, "format": "table"} if is_table else {"exemplar": "_bucket" in expr}),
            }
            for i, (legend, expr) in enumerate(self.queries.items())
        ]  # fmt: skip
        return {
            "id": index + 1, "type": self.kind, "title": self.title, "description": self.help, "datasource": SOURCE,
            "gridPos": {"h": 8, "w": 8, "x": 8 * (index % 3), "y": 8 * (index // 3)}, "targets": targets,
            "fieldConfig": {"defaults": {"unit": self.unit, "min": 0}, "overrides": []},
        }  # fmt: skip


def rate(name: str, by: str = "", where: str = "") -> str:
    """Return the rate of a counter, summed by labels."""
    return f"sum{f' by ({by})' if by else ''} (rate({name}{where}[$__rate_interval]))"


def quantile(part: float, name: str, by: str = "") -> str:
    """Return the query of a histogram's quantile."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({part}, sum by ({labels}) (rate({name}_bucket[$__rate_interval])))"


def or_zero(expr: str) -> str:
    """Return a query that is 0 while the metric has no samples yet."""
    return f"{expr} or vector(0)"


def newest(name: str, by: str = "") -> str:
    """Return the query of a fleet-wide gauge, which every gateway exports."""
    return f"max{f' by ({by})' if by else ''} ({name})"


FIRST, NAMED_FIRST = "lorafleet_time_to_first_token_seconds", "lorafleet_adapter_first_token_seconds"
USES, WAIT = "lorafleet_adapter_uses_total", "lorafleet_adapter_wait_seconds"
TENANT = "sum by (tenant) (rate(lorafleet_tenant_tokens_total[$__rate_interval]))"


def used(name: str) -> str:
    """Return the query of the used share of a worker's memory of one kind."""
    return f'max by (worker) ({name}{{state="used"}}) / sum by (worker) (max by (worker, state) ({name}))'


DASHBOARDS: dict[str, list[Panel]] = {
    "Overview": [
        Panel("Time to the first token", {f"p{round(100 * q)}": quantile(q, FIRST) for q in (0.5, 0.95, 0.99)}, "s"),
        Panel("First token within 1 s", {"part of calls": "lorafleet:first_token_under_1s:ratio5m"}, "percentunit"),
        Panel("Requests", {
            "waiting": newest("lorafleet_queued_requests"), "running": newest("lorafleet_running_requests"),
        }),
        Panel("Age of the oldest waiting request", {
            "{{class}}": newest("lorafleet_oldest_queued_seconds", "class"),
        }, "s"),
        Panel("Tokens", {
            "output": rate("lorafleet_output_tokens_total"), "prompts": rate("lorafleet_prompt_tokens_total"),
        }, "tokens/s"),
        Panel("Answers by status", {"{{status}}": rate("lorafleet_http_requests_total", "status")}, "reqps"),
        Panel("Errors and refusals", {
            "5xx": "lorafleet:http_errors:ratio5m", "429": "lorafleet:http_refused:ratio5m",
        }, "percentunit"),
        Panel("Ends of choices", {"{{finish}}": rate("lorafleet_generations_total", "finish")}, "reqps"),
        Panel("Workers", {"alive": newest("lorafleet_workers")}),
        Panel("Requests by base", {
            "{{base}} {{what}}": newest('lorafleet_base_load{what=~"queued|running"}', "base, what"),
        }, help="Of a fleet with several bases."),
        Panel("Workers by base", {"{{base}}": newest('lorafleet_base_load{what="workers"}', "base")},
              help="Of a fleet with several bases."),
        Panel("Time of whole calls", {"p50": quantile(0.5, "lorafleet_call_seconds"),
                                      "p95": quantile(0.95, "lorafleet_call_seconds")}, "s"),
    ],
    "Adapters": [
        Panel("Where adapters are", {
            "": "max by (adapter, worker, level, pinned, rank) (lorafleet_adapter_loaded)",
        }, kind="table", help="Needs vllm_metrics."),
        Panel("Found in the pool", {"part of requests": "lorafleet:adapter_hits:ratio5m"}, "percentunit"),
        Panel("Where requests found their adapter", {"{{tier}}": rate(USES, "tier")}, "reqps"),
        Panel("Adapters moved", {
            "{{event}}": "sum by (event) (max by (worker, event) (rate(lorafleet_worker_adapter_events_total"
            "[$__rate_interval])))",
        }, "ops"),
        Panel("Time of loads, p95", {
            "from {{tier}}": quantile(0.95, "lorafleet_worker_adapter_load_seconds", "tier"),
        }, "s"),
        Panel("Mean time of loads by adapter", {
            "{{adapter}} from {{tier}}": "topk(10, max by (adapter, tier) (rate(lorafleet_adapter_load_seconds_sum"
            "[$__rate_interval]) / rate(lorafleet_adapter_load_seconds_count[$__rate_interval])))",
        }, "s"),
        Panel("Hottest", {
            "{{adapter}}": f"topk(10, {rate('lorafleet_adapter_requests_total', 'adapter')})",
        }, "reqps"),
        Panel("Coldest", {
            "{{adapter}}": f"bottomk(10, {rate('lorafleet_adapter_requests_total', 'adapter')})",
        }, "reqps"),
        Panel("Part of the first token's time spent waiting for the adapter", {
            "{{adapter}}": f"topk(10, {rate(f'{WAIT}_sum', 'adapter')} / {rate(f'{NAMED_FIRST}_sum', 'adapter')})",
        }, "percentunit"),
        Panel("Time to the first token, p95", {
            "{{adapter}}": f"topk(10, {quantile(0.95, NAMED_FIRST, 'adapter')})",
        }, "s"),
        Panel("Wait for adapters, p95", {"from {{tier}}": quantile(0.95, WAIT, "tier")}, "s"),
        Panel("Tokens", {
            "{{adapter}}": f"topk(10, {rate('lorafleet_adapter_tokens_total', 'adapter')})",
        }, "tokens/s"),
        Panel("Names by state", {"{{state}}": newest("lorafleet_store_names", "state")},
              help="failed: refused, or its source does not answer; GET /v1/adapters says why."),
    ],
    "Workers": [
        Panel("Part of the time by phase", {
            "{{worker}} {{phase}}": "max by (worker, phase) (rate(lorafleet_worker_phase_seconds_total"
            "[$__rate_interval]))",
        }, "percentunit"),
        Panel("KV blocks in use", {"{{worker}}": used("lorafleet_worker_kv_blocks")}, "percentunit"),
        Panel("KV bytes in use", {
            "{{worker}}": 'max by (worker) (lorafleet_worker_kv_bytes{state="used"})',
        }, "bytes"),
        Panel("Adapter pool in use", {"{{worker}}": used("lorafleet_worker_adapter_pool_bytes")}, "percentunit"),
        Panel("Host memory of adapters in use", {
            "{{worker}}": 'max by (worker) (lorafleet_worker_adapter_host_bytes{state="used"})',
        }, "bytes"),
        Panel("Preemptions", {
            "{{worker}}": "max by (worker) (rate(lorafleet_worker_preemptions_total[$__rate_interval]))",
        }, "ops"),
        Panel("Requests", {"{{worker}} {{state}}": newest("lorafleet_worker_requests", "worker, state")}),
        Panel("Steps", {"{{worker}}": "max by (worker) (rate(lorafleet_worker_steps_total[$__rate_interval]))"}, "ops"),
        Panel("Tokens", {
            "{{worker}} {{kind}}": "max by (worker, kind) (rate(lorafleet_worker_tokens_total[$__rate_interval]))",
        }, "tokens/s"),
        Panel("Adapters in the pool", {"{{worker}}": newest("lorafleet_worker_resident_adapters", "worker")}),
    ],
    "Tenants": [
        Panel("Tokens attained", {"{{tenant}}": f"topk(10, {TENANT})"}, "tokens/s"),
        Panel("Fairness", {
            "Jain's index": f"sum({TENANT})^2 / (count({TENANT} > 0) * sum(({TENANT})^2))",
        }, "percentunit", help="1: all that asked got the same; 1 / n: one of n got everything."),
        Panel("Refused", {
            "{{tenant}} {{reason}}": or_zero(rate("lorafleet_tenant_refused_total", "tenant, reason")),
        }, "reqps"),
        Panel("Wait in the queue, p95", {
            "{{tenant}}": f"topk(10, {quantile(0.95, 'lorafleet_tenant_queue_seconds', 'tenant')})",
        }, "s"),
        Panel("Prompt and output tokens", {
            "{{tenant}} {{kind}}": f"topk(10, {rate('lorafleet_tenant_tokens_total', 'tenant, kind')})",
        }, "tokens/s"),
    ],
    "Queue": [
        Panel("Memory of the queue's server", {
            "used": newest("lorafleet_queue_used_bytes"), "limit": newest("lorafleet_queue_max_bytes"),
        }, "bytes"),
        Panel("The queue's answers", {"p95": quantile(0.95, "lorafleet_queue_answer_seconds")}, "s"),
        Panel("Dead letters", {"waiting": newest("lorafleet_dead_letters")}, help="lorafleet dlq list"),
        Panel("Leader", {
            "leads": newest("lorafleet_has_leader"), "leaderships so far": newest("lorafleet_leader_epoch"),
        }),
        Panel("Wait in the queue", {
            "p50": quantile(0.5, "lorafleet_queue_seconds"), "p95": quantile(0.95, "lorafleet_queue_seconds"),
        }, "s"),
        Panel("Plans", {"p95": quantile(0.95, "lorafleet_plan_seconds")}, "s"),
        Panel("Assigned requests, by their adapter", {
            "{{adapter}}": rate("lorafleet_assigned_requests_total", "adapter"),
        }, "reqps"),
        Panel("Workers found dead", {"so far": "sum(lorafleet_workers_lost_total)"}),
        Panel("Requests taken from workers", {
            "{{outcome}}": or_zero(rate("lorafleet_requeued_requests_total", "outcome")),
        }, "reqps"),
        Panel("Reads of logs, deltas that nobody waited for", {
            "reads": rate("lorafleet_gateway_log_reads_total"), "stale": rate("lorafleet_gateway_stale_deltas_total"),
        }, "ops"),
        Panel("Connections dropped", {"{{reason}}": or_zero(rate("lorafleet_http_dropped_total", "reason"))}, "ops"),
        Panel("Memory held for calls", {"{{instance}}": newest("lorafleet_gateway_held_bytes", "instance")}, "bytes"),
    ],
}  # fmt: skip


def dashboard(name: str) -> dict[str, Any]:
    """Return a dashboard's JSON for Grafana."""
    return {
        "uid": f"lorafleet-{name.lower()}", "title": f"Lorafleet: {name}", "tags": ["lorafleet"], "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"}, "refresh": "10s", "timezone": "browser", "editable": True,
        "links": [{"type": "dashboards", "title": "Lorafleet", "tags": ["lorafleet"], "asDropdown": False}],
        "panels": [panel.json(i) for i, panel in enumerate(DASHBOARDS[name])],
    }  # fmt: skip


def files() -> dict[Path, str]:
    """Return the text of each dashboard's file."""
    return {
        FOLDER / f"{name.lower()}.json": json.dumps(dashboard(name), indent=1, ensure_ascii=False) + "\n"
        for name in DASHBOARDS
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
