"""Which worker should go when there are to be fewer: the one that costs the others least. Pure.

The cost has two parts, in ms of work: refetching adapters that no other worker has in as near a tier, and recomputing
the prompts and tokens of the worker's requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from scheduler.placement import AdapterFacts, Bandwidths
from scheduler.workers import Tier, Worker

HALF_LIFE_MS = 600_000
"""Time after which a request says half as much of whether its adapter will be wanted again."""

MAX_ADAPTERS = 100_000
"""Adapters whose use is remembered."""

FactsOf = Callable[[str], AdapterFacts]
WantedOf = Callable[[str], float]


class Popularity:
    """How many requests each adapter has had lately, older ones counting less."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, float]] = {}  # digest -> (requests, as of unix ms), longest unused first

    def note(self, digest: str, now_ms: float) -> None:
        """Count a request for an adapter."""
        num = self.of(digest, now_ms) + 1
        self._found.pop(digest, None)
        self._found[digest] = (num, now_ms)
        if len(self._found) > MAX_ADAPTERS:
            del self._found[next(iter(self._found))]

    def of(self, digest: str, now_ms: float) -> float:
        """Return how many requests an adapter has had lately."""
        num, at_ms = self._found.get(digest, (0.0, now_ms))
        return num * 0.5 ** (max(0.0, now_ms - at_ms) / HALF_LIFE_MS)


def costs_ms(workers: Collection[Worker], wanted: WantedOf, facts: FactsOf, bandwidths: Bandwidths) -> dict[str, float]:
    """Return by its id what each worker's leaving costs the others, in ms of work.

    wanted: requests that an adapter has had lately.
    """
    nearest = _nearest(workers)
    costs: dict[str, float] = {}
    for worker in workers:
        cost_ms = 1000 * worker.model.b * worker.num_tokens
        for digest in worker.resident | worker.host:
            (first, holder), (second, _) = nearest[digest]
            num_bytes = facts(digest).num_bytes
            if holder == worker.wid and second > first:
                saved_ms = bandwidths.cost_ms(second, num_bytes) - bandwidths.cost_ms(first, num_bytes)
                cost_ms += wanted(digest) * saved_ms
        costs[worker.wid] = cost_ms
    return costs


def least_valuable(workers: Collection[Worker], wanted: WantedOf, facts: FactsOf, bandwidths: Bandwidths) -> str:
    """Return the name of the worker that should go first, "" without workers. Of equals the last by name goes."""
    if not workers:
        return ""
    costs = costs_ms(workers, wanted, facts, bandwidths)
    lowest = min(costs.values())
    return max(worker.beat.name for worker in workers if costs[worker.wid] == lowest)


_Copy = tuple[Tier, str]
_NONE: _Copy = (Tier.REMOTE, "")


def _nearest(workers: Collection[Worker]) -> dict[str, tuple[_Copy, _Copy]]:
    """Return the two nearest copies of each adapter that any worker holds, on different workers."""
    found: dict[str, tuple[_Copy, _Copy]] = {}
    for worker in workers:
        for digest in worker.resident | worker.host:
            copy = (Tier.RESIDENT if digest in worker.resident else Tier.HOST, worker.wid)
            first, second = found.get(digest, (_NONE, _NONE))
            found[digest] = (copy, first) if copy[0] < first[0] else (first, min(second, copy))
    return found
