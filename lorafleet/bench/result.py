"""The measurements of a load run, per request and in summary.

Definitions, all from the client's point of view:

- TTFT, time to first token: from sending the request to the first chunk with text.
- Inter-token latency: the gap between two chunks with text.
- TPOT, time per output token: (last chunk - first chunk) / (output tokens - 1) of a request. This is the fair figure
  if a server puts several tokens into a chunk (`tokens_per_chunk` above 1).
- Output tokens: the number that the server reports as `usage`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class BenchRequest:
    """A request, filled while its response streams in. Times are seconds of one monotonic clock."""

    target: str
    start_s: float = 0.0
    end_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list[float])  # arrival times of chunks with text
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    complete: bool = False  # whether the final [DONE] has arrived
    error: str | None = None
    status: int = 0  # HTTP status; 0: no response
    headers: dict[str, str] = field(default_factory=dict[str, str])  # by lower-case name, of a response other than 200

    def as_row(self, origin_s: float) -> dict[str, Any]:
        """Return the request as JSON, without text and single chunks. `start_s` is relative to `origin_s`."""
        return {
            "target": self.target,
            "start_s": round(self.start_s - origin_s, 6),
            "ttft_s": round(self.arrivals_s[0] - self.start_s, 6) if self.arrivals_s else None,
            "e2e_s": round(self.end_s - self.start_s, 6),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "num_chunks": len(self.arrivals_s),
            "finish_reason": self.finish_reason,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency distribution in milliseconds; all zero if nothing was measured."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @classmethod
    def of(cls, samples_s: Sequence[float] | np.ndarray) -> "Latency":
        """Return the distribution of samples in seconds."""
        if len(samples_s) == 0:
            return cls(0.0, 0.0, 0.0, 0.0)
        samples_ms = np.asarray(samples_s) * 1e3
        p50, p90, p99 = np.percentile(samples_ms, [50, 90, 99])
        return cls(float(samples_ms.mean()), float(p50), float(p90), float(p99))


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a group of requests; latencies and token counts are those of successful requests."""

    num_requests: int
    num_errors: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    tokens_per_chunk: float
    ttft: Latency
    inter_token: Latency
    tpot: Latency
    e2e: Latency

    @classmethod
    def of(cls, records: Sequence[BenchRequest], wall_s: float) -> "Summary":
        """Return the figures of `records`, from a run of `wall_s` seconds."""
        good = [record for record in records if record.error is None]
        output_tokens = sum(record.output_tokens for record in good)
        num_chunks = sum(len(record.arrivals_s) for record in good)
        return cls(
            num_requests=len(records),
            num_errors=len(records) - len(good),
            prompt_tokens=sum(record.prompt_tokens for record in good),
            output_tokens=output_tokens,
            output_tokens_per_s=output_tokens / wall_s,
            requests_per_s=len(good) / wall_s,
            tokens_per_chunk=output_tokens / num_chunks if num_chunks else 0.0,
            ttft=Latency.of([record.arrivals_s[0] - record.start_s for record in good if record.arrivals_s]),
            inter_token=Latency.of(inter_token_gaps_s(good)),
            tpot=Latency.of(_tpots_s(good)),
            e2e=Latency.of([record.end_s - record.start_s for record in good]),
        )


def inter_token_gaps_s(records: Iterable[BenchRequest]) -> np.ndarray:
    """Return the gaps between successive chunks of all requests: float64 [num_gaps], seconds."""
    gaps = [np.diff(record.arrivals_s) for record in records if len(record.arrivals_s) > 1]
    return np.concatenate(gaps) if gaps else np.empty(0)


def _tpots_s(records: Iterable[BenchRequest]) -> list[float]:
    return [
        (record.arrivals_s[-1] - record.arrivals_s[0]) / (record.output_tokens - 1)
        for record in records
        if record.output_tokens > 1 and len(record.arrivals_s) > 1
    ]


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A finished load run."""

    config: dict[str, Any]  # the BenchConfig without its API key
    started_at: str  # ISO 8601, UTC
    wall_s: float  # from sending the first request to the end of the last response
    generator_cpu_s: float  # CPU time of the load generator itself
    records: list[BenchRequest]  # in order of completion

    @property
    def summary(self) -> Summary:
        """The figures of all requests."""
        return Summary.of(self.records, self.wall_s)

    @property
    def per_target(self) -> dict[str, Summary]:
        """The figures of each target, those with the most requests first."""
        groups: dict[str, list[BenchRequest]] = {}
        for record in self.records:
            groups.setdefault(record.target, []).append(record)
        ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
        return {target: Summary.of(records, self.wall_s) for target, records in ordered}

    @property
    def errors(self) -> dict[str, int]:
        """The number of requests by error text."""
        counts: dict[str, int] = {}
        for record in self.records:
            if record.error is not None:
                counts[record.error] = counts.get(record.error, 0) + 1
        return counts

    @property
    def generator_cpu_ms_per_chunk(self) -> float:
        """CPU time of the load generator in ms per received chunk."""
        num_chunks = sum(len(record.arrivals_s) for record in self.records)
        return self.generator_cpu_s * 1e3 / num_chunks if num_chunks else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON, without the times of single chunks."""
        origin_s = min((record.start_s for record in self.records), default=0.0)
        return {
            "started_at": self.started_at,
            "config": self.config,
            "wall_s": self.wall_s,
            "generator_cpu_ms_per_chunk": self.generator_cpu_ms_per_chunk,
            "summary": asdict(self.summary),
            "per_target": {target: asdict(summary) for target, summary in self.per_target.items()},
            "errors": self.errors,
            "requests": [record.as_row(origin_s) for record in self.records],
        }
