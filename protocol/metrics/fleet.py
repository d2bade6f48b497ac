"""Metrics from workers' heartbeats, and of the adapters on them, under names that other tools read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector

from protocol.metrics import series
from protocol.wire.messages import LOAD_BUCKETS_S, WorkerBeat

MAX_LISTED = 64
"""Maximum number of adapters listed in one label."""


class WorkerCollector(Collector):
    """The workers' metrics, from their heartbeats: of all workers at a gateway, of one at a worker's own port."""

    def __init__(self) -> None:
        self._beats: list[WorkerBeat] = []

    def show(self, beats: Iterable[WorkerBeat]) -> None:
        """Replace the exported workers; of two with the same name, the one with the later heartbeat is exported."""
        self._beats = list({beat.name: beat for beat in sorted(beats, key=lambda beat: beat.sent_ms)}.values())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics for Prometheus; none if there are no workers."""
        if not self._beats:
            return
        steps, seconds, tokens = (
            family.total() for family in (series.WORKER_STEPS, series.WORKER_PHASE_SECONDS, series.WORKER_TOKENS)
        )
        preemptions, events = series.WORKER_PREEMPTIONS.total(), series.WORKER_ADAPTER_EVENTS.total()
        loads = series.WORKER_LOAD_SECONDS.spread()
        requests, blocks, kv, pool, host, resident = (
            family.now()
            for family in (
                series.WORKER_REQUESTS,
                series.WORKER_KV_BLOCKS,
                series.WORKER_KV_BYTES,
                series.WORKER_POOL_BYTES,
                series.WORKER_HOST_BYTES,
                series.WORKER_RESIDENT,
            )
        )
        for beat in self._beats:
            name, counters = beat.name, beat.counters
            steps.add_metric([name], counters.num_steps)
            for phase in series.PHASES:
                seconds.add_metric([name, phase], getattr(counters, f"{phase}_s"))
            for kind in series.TOKEN_KINDS:
                tokens.add_metric([name, kind], getattr(counters, f"num_{kind}_tokens"))
            preemptions.add_metric([name], counters.num_preemptions)
            num = {"fetch": beat.num_fetches, "load": beat.num_loads, "eviction": counters.num_evictions}
            for event, value in num.items():
                events.add_metric([name, event], value)
            for tier, (*counts, total_s) in beat.load_seconds.items():
                bounds = [*map(str, LOAD_BUCKETS_S), "+Inf"]
                loads.add_metric([name, tier], list(zip(bounds, accumulate(counts), strict=True)), total_s)
            requests.add_metric([name, "running"], beat.running)
            requests.add_metric([name, "waiting"], beat.waiting)
            used = beat.kv_blocks_total - beat.kv_blocks_free
            block_bytes = beat.kv_bytes_total / beat.kv_blocks_total if beat.kv_blocks_total else 0
            sizes = (
                (blocks, beat.kv_blocks_free, used),
                (kv, beat.kv_blocks_free * block_bytes, used * block_bytes),
                (pool, beat.pool_bytes_free, beat.pool_bytes_total - beat.pool_bytes_free),
                (host, max(0, beat.host_bytes_total - beat.host_bytes_used), beat.host_bytes_used),
            )
            for family, num_free, num_used in sizes:
                family.add_metric([name, "free"], num_free)
                family.add_metric([name, "used"], num_used)
            resident.add_metric([name], len(beat.resident))
        yield from (steps, seconds, tokens, preemptions, events, loads, requests, blocks, kv, pool, host, resident)


@dataclass(frozen=True, slots=True)
class Holding:
    """An adapter on a worker."""

    worker: str
    adapter: str  # name
    level: str  # resident, loading or host
    pinned: bool
    rank: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A gateway's view of the fleet's adapters and requests."""

    model: str
    running: int = 0
    waiting: int = 0  # requests waiting for a worker
    deferred: int = 0  # requests on a worker that wait for their adapter
    kv_usage: float = 0.0
    num_steps: int = 0  # steps of all workers since their starts
    num_step_tokens: int = 0  # tokens in these steps
    holdings: Sequence[Holding] = ()
    running_adapters: Sequence[str] = ()
    waiting_adapters: Sequence[str] = ()
    max_adapters: int = 0  # number of adapters that fit into the pools, as far as known
    at_s: float = field(default_factory=time.time)


class ResidencyMetrics(Collector):
    """Locations of adapters, and vLLM's names for the whole fleet. Exported if `vllm_metrics` is on."""

    def __init__(self) -> None:
        self.seen: Seen | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; none before `seen` is set."""
        seen = self.seen
        if seen is None:
            return
        loaded, alias = series.ADAPTER_LOADED.now(), series.VLLM_LORA_LOADED.now()
        for one in seen.holdings:
            labels = [one.worker, one.adapter, one.level, str(one.pinned).lower(), str(one.rank)]
            loaded.add_metric(labels, 1)
            alias.add_metric(labels, 1)
        yield from (loaded, alias)
        for family, value in (
            (series.VLLM_RUNNING, seen.running),
            (series.VLLM_WAITING, seen.waiting + seen.deferred),
            (series.VLLM_KV_USAGE, seen.kv_usage),
        ):
            metric = family.now()
            metric.add_metric([seen.model], value)
            yield metric
        reasons = series.VLLM_WAITING_BY_REASON.now()
        for reason, num in (("capacity", seen.waiting), ("deferred", seen.deferred)):
            reasons.add_metric([seen.model, reason], num)
        yield reasons
        tokens = series.VLLM_ITERATION_TOKENS.spread()
        tokens.add_metric([seen.model], [("+Inf", seen.num_steps)], seen.num_step_tokens)
        yield tokens
        info = series.VLLM_LORA_INFO.now()
        listed = (",".join(names[:MAX_LISTED]) for names in (seen.running_adapters, seen.waiting_adapters))
        info.add_metric([*listed, str(seen.max_adapters)], seen.at_s)
        yield info


WORKERS = WorkerCollector()
REGISTRY.register(WORKERS)
RESIDENCY = ResidencyMetrics()
REGISTRY.register(RESIDENCY)
