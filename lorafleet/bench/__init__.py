"""The load generator for OpenAI-compatible servers, used by `lorafleet bench` and the benchmark scripts."""

from lorafleet.bench.load import WarmupError, run_bench, run_load
from lorafleet.bench.result import BenchResult, Latency, RequestRecord, Summary
from lorafleet.bench.workload import BenchConfig, Target

__all__ = [
    "BenchConfig",
    "BenchResult",
    "Latency",
    "RequestRecord",
    "Summary",
    "Target",
    "WarmupError",
    "run_bench",
    "run_load",
]
