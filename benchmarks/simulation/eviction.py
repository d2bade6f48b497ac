"""Eviction policies of the pool: GDSF, as implemented by the worker's `PagePool`, and LRU, on Zipf traces.

`python -m benchmarks.simulation.eviction --json FILE`. Simulated without a model: a request takes a reference to its
adapter, several requests run at once, and an adapter that is not in the pool has to be loaded. Seeded: every run gives
the same numbers.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gpu_worker.adapters.pool import PagePool, Resident

RANKS = (8, 16, 32, 64)
PAGE_ROWS = 16
PAGE_BYTES = 1 << 20
LATENCY_S = 0.01  # per fetch
BYTES_PER_S = 2e8


@dataclass(slots=True)
class LruPool(PagePool):
    """A pool that evicts the least recently used adapter."""

    num_touches: int = 0

    def _touch(self, resident: Resident) -> None:
        self.num_touches += 1
        resident.priority = float(self.num_touches)


@dataclass(frozen=True, slots=True)
class PolicyCost:
    """The cost of a trace under one policy."""

    policy: str
    zipf: float
    hit_rate: float
    num_loads: int
    loaded_bytes: int
    load_s: float


def zipf_trace(random: np.random.Generator, num_adapters: int, num_requests: int, zipf: float) -> np.ndarray:
    """Return the adapter of each request: int64 [requests], 0 is the most popular one."""
    weights = np.arange(1, num_adapters + 1) ** -zipf
    return random.choice(num_adapters, num_requests, p=weights / weights.sum())


def play(policy: str, trace: np.ndarray, pages: Sequence[int], *, capacity: int, num_running: int) -> np.ndarray:
    """Play a trace from an empty pool of `capacity` pages, with `num_running` requests at a time. pages: by adapter.

    Return whether each request found its adapter in the pool: bool [requests].
    """
    cost: Callable[[str], float] = lambda digest: load_s(pages[int(digest)])  # noqa: E731
    kind = LruPool if policy == "LRU" else PagePool
    pool = kind((capacity,), (PAGE_BYTES,), len(pages), cost)
    running: deque[str] = deque()
    hits = np.zeros(len(trace), bool)
    for i, adapter in enumerate(trace):
        digest = str(adapter)
        if len(running) == num_running:
            pool.release(running.popleft())
        if digest in pool.residents:
            hits[i] = True
        else:
            while pool.reserve(digest, (pages[adapter],)) is None:
                pool.release(running.popleft())  # adapters in use are never evicted: wait until one is released
            pool.publish(digest)
        pool.acquire(digest)
        running.append(digest)
    pool.check_integrity()
    return hits


def load_s(num_pages: int) -> float:
    """Return the seconds to load an adapter."""
    return LATENCY_S + num_pages * PAGE_BYTES / BYTES_PER_S


def run(
    policy: str, zipf: float, *, num_adapters: int = 2000, num_slots: int = 64, num_requests: int = 20_000,
    num_running: int = 16,
) -> PolicyCost:  # fmt: skip
    """Play one trace over adapters of all `RANKS`; the first tenth warms the pool and is not counted.

    num_slots: adapters of mean size that the pool holds.
    """
    random = np.random.default_rng(0)
    trace = zipf_trace(random, num_adapters, num_requests, zipf)
    pages = [-(-RANKS[rank] // PAGE_ROWS) for rank in random.integers(0, len(RANKS), num_adapters)]
    capacity = round(num_slots * float(np.mean(pages)))
    warm = num_requests // 10
    hits = play(policy, trace, pages, capacity=capacity, num_running=num_running)[warm:]
    loaded = [pages[adapter] for adapter, hit in zip(trace[warm:], hits, strict=True) if not hit]
    return PolicyCost(
        policy, zipf, round(float(hits.mean()), 4), len(loaded), sum(loaded) * PAGE_BYTES,
        round(sum(map(load_s, loaded)), 2),
    )  # fmt: skip


def main() -> None:
    """Compare eviction policies on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    outcomes = [run(policy, zipf) for zipf in (0.8, 1.0, 1.2) for policy in ("LRU", "GDSF")]
    for outcome in outcomes:
        print(
            f"zipf {outcome.zipf}  {outcome.policy:5} hits {outcome.hit_rate:.1%}  loads {outcome.num_loads}"
            f"  {outcome.loaded_bytes / 1e9:.2f} GB  {outcome.load_s:.1f} s"
        )
    if args.json:
        args.json.write_text(json.dumps({"outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1))


if __name__ == "__main__":
    main()
