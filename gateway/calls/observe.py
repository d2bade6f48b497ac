"""What is counted of calls, under our metric names and LoRAX's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from prometheus_client import Counter, Histogram

from gateway.calls.tokenize import Prompt
from gateway.lorax import metrics as lorax
from protocol.runtime import metrics


def kind_of(digest: str) -> str:
    """Return a metric's label of whoever answers: an adapter, or the base model."""
    return metrics.KIND_ADAPTER if digest else metrics.KIND_BASE


@cache  # prometheus_client looks for it under a lock each time
def _child(metric: Counter | Histogram, label: str) -> Any:
    """Return a metric's child of a label."""
    return metric.labels(label)


def accepted(prompts: Sequence[Prompt]) -> None:
    """Count a call that is in the queue."""
    for prompt in prompts:
        _child(metrics.PROMPT_TOKENS, kind_of(prompt.target.digest)).inc(prompt.num_tokens)
    lorax.accepted([(prompt.num_tokens, prompt.max_new_tokens) for prompt in prompts])


def first_token(kind: str, seconds: float) -> None:
    """Note how long a call waited for its first token."""
    _child(metrics.FIRST_TOKEN_SECONDS, kind).observe(seconds)


def choice_ended(finish: str) -> None:
    """Count a choice that came to an end, and how."""
    _child(metrics.GENERATIONS, finish).inc()


def left(kind: str, num_tokens: int) -> None:
    """Count the output tokens of a call that nobody follows any more."""
    _child(metrics.OUTPUT_TOKENS, kind).inc(num_tokens)


def succeeded(kind: str, seconds: float, num_tokens: int) -> None:
    """Count a call that came to its end."""
    _child(metrics.CALL_SECONDS, kind).observe(seconds)
    lorax.succeeded(seconds, num_tokens)


def client_gone() -> None:
    """Count a call whose client hung up."""
    metrics.CLIENTS_GONE.inc()
    lorax.failed("dropped")


def cut_off() -> None:
    """Count an answer that failed once it had begun."""
    lorax.failed("incomplete")
