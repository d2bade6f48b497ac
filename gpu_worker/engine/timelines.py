"""Event times of an engine's requests, reported with the first token and the end of each."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from gpu_worker.planning.request import EngineRequest, TokenOutput
from protocol.wire.clock import now_s
from protocol.wire.messages import Timing

RESIDENT = "resident"
"""The tier of an adapter that is in the pool."""


@dataclass(slots=True)
class _Times:
    """Times of one request, in seconds since it was accepted; below 0 for events that have not happened."""

    taken_s: float  # unix time
    digest: str
    tier: str
    staged_s: float = -1.0
    ready_s: float = -1.0
    begun_s: float = -1.0
    first_s: float = -1.0
    num_preempted: int = 0

    def timing(self, ended_s: float, num_cached: int) -> Timing:
        return Timing(
            round(1000 * self.taken_s), 0, self.tier, _ms(self.staged_s), _ms(self.ready_s), _ms(self.begun_s),
            _ms(self.first_s), _ms(ended_s), self.num_preempted, num_cached,
        )  # fmt: skip


def _ms(seconds: float) -> int:
    return round(1000 * seconds) if seconds >= 0 else -1


class Timelines:
    """The event times of all requests of an engine, by request id. A step without events costs nothing here."""

    def __init__(self) -> None:
        self._all: dict[str, _Times] = {}
        self._without_adapter: set[str] = set()
        self._not_begun: set[str] = set()
        self._silent: set[str] = set()  # requests without output yet

    def take(self, request: EngineRequest, tier: str) -> None:
        """Start the timeline of a request. tier: where its adapter is; "" without one."""
        rid = request.rid
        self._all[rid] = _Times(now_s(), request.digest, tier)
        self._not_begun.add(rid)
        self._silent.add(rid)
        if tier not in ("", RESIDENT):
            self._without_adapter.add(rid)

    def look(self, is_resident: Callable[[str], bool], host: Container[str]) -> None:
        """Record which adapters have been staged or loaded since the last call."""
        for rid in list(self._without_adapter):
            times = self._all[rid]
            ready = is_resident(times.digest)
            if times.staged_s < 0 and times.tier in ("store", "loading") and (ready or times.digest in host):
                times.staged_s = now_s() - times.taken_s
            if ready:
                times.ready_s = now_s() - times.taken_s
                self._without_adapter.discard(rid)

    def begin(self, rids: Iterable[str]) -> None:
        """Record that a step computes these requests."""
        if not self._not_begun:
            return
        for rid in self._not_begun.intersection(rids):
            self._all[rid].begun_s = now_s() - self._all[rid].taken_s
            self._not_begun.discard(rid)

    def preempt(self, rids: Iterable[str]) -> None:
        """Record that requests were preempted."""
        for rid in rids:
            if times := self._all.get(rid):
                times.num_preempted += 1

    def tell(self, outputs: Iterable[TokenOutput]) -> None:
        """Set the times so far on the first and the last output of each request."""
        for output in outputs:
            if not output.finish and output.rid not in self._silent:
                continue
            times = self._all.get(output.rid)
            if times is None:
                continue
            since_s = now_s() - times.taken_s
            self._silent.discard(output.rid)
            if times.first_s < 0 and output.ids:
                times.first_s = since_s
            output.timing = times.timing(since_s if output.finish else -1.0, output.num_cached_tokens)
            if output.finish:
                self.forget(output.rid)

    def forget(self, rid: str) -> None:
        """Drop the times of a request."""
        if self._all.pop(rid, None) is not None:
            for rids in (self._without_adapter, self._not_begun, self._silent):
                rids.discard(rid)

    def clear(self) -> None:
        """Drop all times."""
        for rid in list(self._all):
            self.forget(rid)
