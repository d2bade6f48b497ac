"""Metrics under LoRAX's names, and `/metrics` in LoRAX's JSON format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import REGISTRY

from protocol.metrics import series as metrics

_CAUSES = {400: "validation", 422: "validation", 413: "validation", 429: "overloaded", 403: "download_adapter",
           404: "download_adapter"}  # fmt: skip


def accepted(prompts: Sequence[tuple[int, int]]) -> None:
    """Count a submitted call. prompts: of each, its number of tokens and its maximum number of output tokens."""
    metrics.LORAX_INPUT_COUNT.observe(len(prompts))
    for length, limit in prompts:
        metrics.LORAX_INPUT_LENGTH.observe(length)
        metrics.LORAX_MAX_NEW.observe(limit)


def succeeded(seconds: float, num_tokens: int) -> None:
    """Count a completed call. seconds: its duration; num_tokens: its output tokens."""
    metrics.LORAX_SUCCESS.inc()
    metrics.LORAX_GENERATED.observe(num_tokens)
    metrics.LORAX_TOKEN_SECONDS.observe(seconds / max(num_tokens, 1))


def failed(cause: str) -> None:
    """Count a call that failed after its answer had begun."""
    metrics.LORAX_FAILURE.labels(cause).inc()


def answered(status: int, seconds: float) -> None:
    """Count an HTTP request to an endpoint that runs the model. seconds: its duration."""
    metrics.LORAX_COUNT.inc()
    metrics.LORAX_SECONDS.observe(seconds)
    if status >= 400:
        failed(_CAUSES.get(status, "generation"))


def timed(validation_s: float, queue_s: float, inference_s: float) -> None:
    """Observe the durations of a call's phases, by an endpoint of LoRAX's native API."""
    metrics.LORAX_VALIDATION_SECONDS.observe(validation_s)
    metrics.LORAX_QUEUE_SECONDS.observe(queue_s)
    metrics.LORAX_INFERENCE_SECONDS.observe(inference_s)


def as_json() -> dict[str, Any]:
    """Return all metrics in LoRAX's JSON format: by name `{type, data: [{key, value}]}`."""
    found: dict[str, Any] = {}
    for metric in REGISTRY.collect():
        data: list[dict[str, Any]] = []
        for sample in metric.samples:
            part = sample.name.removeprefix(metric.name).removeprefix("_")
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            key = f"{sample.name}{{{labels}}}" if labels else "" if part == "total" else part
            data.append({"key": key, "value": sample.value})
        found[metric.name] = {"type": metric.type, "data": data}
    return found
