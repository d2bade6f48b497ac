"""The load generator for OpenAI-compatible servers, used by `lorafleet bench` and the benchmark scripts."""

from lorafleet.bench.load import WarmupError, run_bench, run_load
from lorafleet.bench.result import BenchRequest, BenchResult, Latency, Summary
from lorafleet.bench.workload import BenchConfig, BenchTarget

__all__ = [
    "BenchConfig",
    "BenchRequest",
    "BenchResult",
    "BenchTarget",
    "Latency",
    "Summary",
    "WarmupError",
    "run_bench",
    "run_load",
]
