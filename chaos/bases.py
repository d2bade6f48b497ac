"""Several base models on fewer workers, which swap all the time; checks that each base still gets its turn."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from chaos.clients.asks import Ask
from chaos.fleet import ProcessFleet
from protocol.queue.books.audit import MAX_ENTRIES

MAX_SWAP_WAIT_S, MIN_RESIDENCY_S = 30.0, 1.0
"""Settings of the scheduler. Two workers keep this bound for three bases if a start takes at most 19 s."""

ANSWER_S = 10.0
"""Maximum seconds for an answer once its base is loaded; two cores run the whole fleet."""

FAILED_S = 600.0
"""Maximum seconds for which a base counts as failed after its starts were killed."""

DECIDE_S = 2.0
"""Maximum seconds from when a swap is due to the order for it."""

LULL_BOUNDS = 2.0
"""Duration of the fault-free time at the end, as a multiple of the bound on a base's silence."""


def silence_bound_s(num_bases: int, num_workers: int, start_s: float) -> float:
    """Return the maximum seconds between two answers of a base that is asked without a pause; see docs/bases.md.

    start_s: duration of a worker's start.
    """
    is_kept = num_bases * (start_s + MIN_RESIDENCY_S) <= num_workers * MAX_SWAP_WAIT_S
    wait_s = MAX_SWAP_WAIT_S if is_kept else 5 * num_bases * start_s / num_workers
    return wait_s + start_s + DECIDE_S + ANSWER_S


def longest_silence_s(answers_s: Sequence[float], from_s: float, to_s: float) -> float:
    """Return the longest interval without an answer in `from_s` to `to_s`, in s."""
    times = [from_s, *sorted(at_s for at_s in answers_s if from_s < at_s < to_s), to_s]
    return max(b - a for a, b in itertools.pairwise(times))


class Turns:
    """Records the times of each base's answers."""

    def __init__(self, bases: Mapping[str, str]) -> None:
        """bases: model name in requests -> its base."""
        self._base_of = bases
        self._answers_s: dict[str, list[float]] = defaultdict(list)
        self.silences_s: dict[str, float] = {}  # base -> the longest one without faults

    def asks_of(self, client: int, asks: Sequence[Ask]) -> Sequence[Ask]:
        """Return the asks of a client: of one base, so that each base always has queued work, or, for some, of all."""
        names = [*dict.fromkeys(self._base_of.values())]
        own = names[0] if len(names) == 1 else ["", *names][client % (1 + len(names))]
        return [ask for ask in asks if own in ("", self._base_of[ask.model])]

    def note(self, model: str, at_s: float) -> None:
        """Record that a model has answered."""
        self._answers_s[self._base_of[model]].append(at_s)

    async def watch(self, fleet: ProcessFleet, num_workers: int) -> list[str]:
        """Watch a fleet after its last fault. Return a message for each base that gave no answer for too long."""
        num_bases = len(set(self._base_of.values()))
        async with asyncio.timeout(FAILED_S):
            while True:
                _, failed = await fleet.bus.members.bases()
                if not failed:
                    break
                await asyncio.sleep(1.0)
        from_s = to_s = time.monotonic()
        start_s, bound_s = 0.0, 0.0
        while to_s <= from_s + LULL_BOUNDS * bound_s:
            start_s = max(start_s, await _start_s(fleet))
            bound_s = silence_bound_s(num_bases, num_workers, start_s)
            await asyncio.sleep(1.0)
            to_s = time.monotonic()
        return self.silent(from_s, to_s, bound_s)

    def silent(self, from_s: float, to_s: float, bound_s: float) -> list[str]:
        """Return a message for each base that was without an answer for too long in a fault-free interval."""
        names = sorted(set(self._base_of.values()))
        self.silences_s = {name: longest_silence_s(self._answers_s[name], from_s, to_s) for name in names}
        return [
            f"without faults, {name} answered nothing for {silence_s:.1f} s; the bound is {bound_s:.1f} s"
            for name, silence_s in self.silences_s.items()
            if silence_s > bound_s
        ]


async def _start_s(fleet: ProcessFleet) -> float:
    """Return the longest start of the current workers, in s."""
    return max((beat.start_s for beat in (await fleet.bus.members.worker_beats()).values() if beat), default=0.0)


async def all_served(fleet: ProcessFleet, models: Iterable[str], num_bases: int, key: str) -> None:
    """Wait until every base was served once and the gateways list all models. Raises TimeoutError.

    key: an API key, "" for a fleet without keys.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with asyncio.timeout(180):
        while True:
            answers = [await fleet.http.get(f"{url}/v1/models", headers=headers) for url in fleet.urls]
            listed = [{one["id"] for one in answer.json()["data"]} for answer in answers]
            served, _ = await fleet.bus.members.bases()
            if len(served) == num_bases and set.intersection(*listed) >= set(models) - {"base"}:
                return
            await asyncio.sleep(0.2)


async def num_swaps(fleet: ProcessFleet) -> int:
    """Return the number of swaps in the audit log."""
    entries = await fleet.bus.audit.newest(MAX_ENTRIES)
    return sum(entry.action == "worker.swap" and entry.outcome == "done" for _, entry in entries)
