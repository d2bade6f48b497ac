"""Chooses the worker to remove when scaling in: the one whose removal costs the others least. Pure.

The cost has two parts, in ms of work: reloading adapters that no other worker holds in an equally near tier, and
recomputing the prompts and tokens of the worker's requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from scheduler.placement import AdapterFacts, Bandwidths
from scheduler.workers import Tier, Worker

HALF_LIFE_MS = 600_000
"""Milliseconds after which a past request counts half in an adapter's popularity."""

MAX_ADAPTERS = 100_000
"""Maximum number of adapters whose popularity is remembered."""

FactsOf = Callable[[str], AdapterFacts]
WantedOf = Callable[[str], float]


class Popularity:
    """The number of recent requests per adapter, with exponential decay."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, float]] = {}  # digest -> (decayed count, at unix ms), longest unused first

    def note(self, digest: str, now_ms: float) -> None:
        """Count a request for an adapter."""
        num = self.of(digest, now_ms) + 1
        self._found.pop(digest, None)
        self._found[digest] = (num, now_ms)
        if len(self._found) > MAX_ADAPTERS:
            del self._found[next(iter(self._found))]

    def of(self, digest: str, now_ms: float) -> float:
        """Return an adapter's decayed number of requests."""
        num, at_ms = self._found.get(digest, (0.0, now_ms))
        return num * 0.5 ** (max(0.0, now_ms - at_ms) / HALF_LIFE_MS)


def costs_ms(workers: Collection[Worker], wanted: WantedOf, facts: FactsOf, bandwidths: Bandwidths) -> dict[str, float]:
    """Return wid -> the cost of removing that worker for the others, in ms of work.

    wanted: returns an adapter's decayed number of recent requests.
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
    """Return the name of the worker to remove first, "" without workers; among equals, the last by name."""
    if not workers:
        return ""
    costs = costs_ms(workers, wanted, facts, bandwidths)
    lowest = min(costs.values())
    return max(worker.beat.name for worker in workers if costs[worker.wid] == lowest)


_Copy = tuple[Tier, str]
_NONE: _Copy = (Tier.REMOTE, "")


def _nearest(workers: Collection[Worker]) -> dict[str, tuple[_Copy, _Copy]]:
    """Return the two nearest copies, on different workers, of each adapter that any worker holds."""
    found: dict[str, tuple[_Copy, _Copy]] = {}
    for worker in workers:
        for digest in worker.resident | worker.host:
            copy = (Tier.RESIDENT if digest in worker.resident else Tier.HOST, worker.wid)
            first, second = found.get(digest, (_NONE, _NONE))
            found[digest] = (copy, first) if copy[0] < first[0] else (first, min(second, copy))
    return found
