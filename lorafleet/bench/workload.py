"""The requests of a load run: targets, prompts and arrival times, all drawn from one seed. Pure: no I/O, no clock."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Common words that are one token each for most tokenizers, so that a prompt has about as many tokens as words.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "kid body information back parent face others level office door health person art war history party result "
    "change morning reason research girl guy moment air teacher force education"
)
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """A model or adapter to request, with the request fields that select it."""

    name: str  # name in reports
    body: Mapping[str, Any]  # merged into each request, usually {"model": name}

    @classmethod
    def model(cls, name: str) -> "BenchTarget":
        """Return the target that the field `model` selects."""
        return cls(name, {"model": name})


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """A load run against one server."""

    url: str  # URL of the server, with or without a trailing /v1
    targets: tuple[BenchTarget, ...]
    zipf_s: float | None = None  # weight of the i-th target: 1 / i**s; None: round robin
    num_requests: int = 64
    concurrency: int = 8  # requests in flight; in an open loop, their maximum
    rate_per_s: float | None = None  # mean of Poisson arrivals (open loop); None: closed loop
    prompt_words: int = 64
    output_tokens: int = 64
    ignore_eos: bool = True
    chat: bool = False  # /v1/chat/completions instead of /v1/completions
    num_warmup: int = 0  # unmeasured requests at the start, round robin over the targets
    timeout_s: float = 300.0  # deadline per request
    seed: int = 0
    api_key: str | None = None
    body: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})  # further request fields

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("a load run needs at least one target")
        for name in ("num_requests", "concurrency", "prompt_words", "output_tokens", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.rate_per_s is not None and self.rate_per_s <= 0:
            raise ValueError(f"rate_per_s is {self.rate_per_s}; it must be positive")


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request with its due time."""

    target: BenchTarget
    body: dict[str, Any]
    due_s: float  # seconds after the start of the run; 0 in a closed loop


def plan_warmup(config: BenchConfig) -> Iterator[PlannedRequest]:
    """Yield the warm-up requests, which fill caches and adapter pools, round robin over the targets."""
    rng = np.random.default_rng((config.seed, 1))
    for index in range(config.num_warmup):
        yield _request(config, config.targets[index % len(config.targets)], rng, 0.0)


def plan_requests(config: BenchConfig) -> Iterator[PlannedRequest]:
    """Yield the measured requests by due time. All prompts differ, so a prefix cache has no effect."""
    rng = np.random.default_rng((config.seed, 0))
    order = choose_targets(config, rng)
    due_s = np.zeros(config.num_requests)
    if config.rate_per_s is not None:
        due_s = np.cumsum(rng.exponential(1 / config.rate_per_s, config.num_requests))
    for index, due in zip(order, due_s, strict=True):
        yield _request(config, config.targets[index], rng, float(due))


def choose_targets(config: BenchConfig, rng: np.random.Generator) -> np.ndarray:
    """Return the target index of each request: int64 [num_requests]."""
    if config.zipf_s is None:
        return np.arange(config.num_requests) % len(config.targets)
    weights = 1.0 / np.arange(1, len(config.targets) + 1) ** config.zipf_s
    return rng.choice(len(config.targets), size=config.num_requests, p=weights / weights.sum())


def _request(config: BenchConfig, target: BenchTarget, rng: np.random.Generator, due_s: float) -> PlannedRequest:
    prompt = " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=config.prompt_words))
    body: dict[str, Any] = {"max_tokens": config.output_tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if config.ignore_eos:
        body["ignore_eos"] = True
    if config.chat:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    return PlannedRequest(target, {**body, **config.body, **target.body}, due_s)
