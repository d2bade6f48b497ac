"""The workers: who lives, what each holds, how much it may still get. Fed with beats; knows no queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from protocol.wire import messages as m
from protocol.wire.keys import BATCH
from scheduler.request import BASE, Request

QUEUED_AHEAD = 2
"""Requests a worker may have above its capacity, so that it never waits for the next one."""

KEPT_FOR_OTHERS = 8
"""One in so many places of a worker that requests which give way leave free."""

KEPT_FROM_BATCH = 4
"""The same of batch work."""

MAX_LOADS = 8
"""Adapters that may be on their way to a worker for requests already assigned to it."""

MISSED_BEATS_S = 1.5
"""Silence after which a worker whose name has come back under a new id counts as dead."""

# Of a model that no worker has fitted yet: seconds of a step, and per sequence in it.
UNFITTED_STEP = m.StepModel(a=0.02, b=0.0005, d=1e-6)


class Tier(IntEnum):
    """Where an adapter is, seen from a worker; the nearest first."""

    RESIDENT = 0
    LOADING = 1
    HOST = 2
    REMOTE = 3


def num_kept(capacity: int, one_in: int = KEPT_FOR_OTHERS) -> int:
    """Return how many of a worker's places are kept free: never all."""
    return min(max(1, capacity // one_in), capacity - 1)


@dataclass(slots=True)
class Worker:
    """One worker process. What it holds is counted here from assignment to end."""

    beat: m.WorkerBeat
    silent_s: float = 0.0
    unreachable: bool = False  # its work stream was gone at the last try
    resident: frozenset[str] = frozenset()
    loading: frozenset[str] = frozenset()
    host: frozenset[str] = frozenset()
    indexed: frozenset[str] = frozenset()  # what `Fleet.holders` says of it
    model: m.StepModel = UNFITTED_STEP
    requests: dict[str, Request] = field(default_factory=dict)
    num_ready: int = 0  # requests that take capacity
    num_over_share: int = 0  # of them, those whose places others may take
    by_digest: Counter[str] = field(default_factory=Counter)
    cold: Counter[str] = field(default_factory=Counter)  # digest -> requests that wait for it
    suspects: Counter[int] = field(default_factory=Counter)  # attempts -> such requests without progress yet
    ranks: dict[str, int] = field(default_factory=dict)  # of the distinct adapters of its requests
    rank_sum: int = 0
    num_tokens: int = 0  # prompt and expected output of its requests
    prefill_until_ms: float = 0.0  # when it should be through with the prompts it was given

    @property
    def wid(self) -> str:
        return self.beat.wid

    @property
    def load(self) -> int:
        return len(self.requests)

    @property
    def num_cold(self) -> int:
        """Requests that wait for their adapter and take no capacity."""
        return len(self.requests) - self.num_ready

    @property
    def available(self) -> bool:
        return not self.beat.draining and not self.unreachable and self.beat.capacity > 0

    def tier(self, digest: str) -> Tier:
        if digest == BASE or digest in self.resident:
            return Tier.RESIDENT
        if digest in self.loading or digest in self.cold:
            return Tier.LOADING
        return Tier.HOST if digest in self.host else Tier.REMOTE

    def ready_credit(self, cls: str, *, gives_way: bool = False, over_share: bool = False) -> int:
        """Return how many requests whose adapter is there it may get."""
        beat = self.beat
        if cls == BATCH or gives_way:
            credit = self._places_unkept(cls) - self.num_ready
        else:
            credit = beat.capacity + QUEUED_AHEAD - self.num_in_front(over_share=over_share)
        takes_places = not (over_share or gives_way or cls == BATCH) and self.num_over_share > 0
        if beat.kv_blocks_free * 16 < beat.kv_blocks_total and beat.waiting > beat.waiting_adapter and not takes_places:
            return 0  # memory, not the number of requests, limits it now
        return credit

    def num_in_front(self, *, over_share: bool) -> int:
        """Return how many requests one more would have to wait for, were there no more places."""
        return self.num_ready - (0 if over_share else self.num_over_share)

    def takes_cold(self, digest: str, cls: str, *, gives_way: bool = False) -> bool:
        """Tell whether it may get a request that has to wait for `digest` there."""
        leaves_room = cls == BATCH or gives_way
        if leaves_room and self.load >= self._places_unkept(cls):
            return False  # those that wait for one adapter come to their places together
        limit = MAX_LOADS // 2 if leaves_room else MAX_LOADS
        return (digest in self.cold or len(self.cold) < limit) and self.num_cold < self.beat.capacity

    def _places_unkept(self, cls: str) -> int:
        """Return how many places those may fill that leave some to others."""
        return self.beat.capacity - num_kept(self.beat.capacity, KEPT_FROM_BATCH if cls == BATCH else KEPT_FOR_OTHERS)

    def step_s(self, request: Request, num_tokens: int, rank: int) -> float:
        """Predict its step time with `request`, of `num_tokens` and an adapter of `rank`, added."""
        more = 0 if request.submit.digest in self.by_digest else rank
        return self.model.seconds(len(self.requests) + 1, self.num_tokens + num_tokens, self.rank_sum + more)


class Fleet:
    """All workers known, dead ones until they are removed."""

    def __init__(self, beat_timeout_s: float) -> None:
        self._beat_timeout_s = beat_timeout_s
        self.workers: dict[str, Worker] = {}
        self._silent_s: dict[str, float] = {}  # registered, but never heard
        self._moved: set[str] = set()
        self.version = 0
        """Changes when the available workers or their capacities do."""
        self.num_assigned = 0
        """Requests on all workers."""
        self.holders: dict[str, set[str]] = {}
        """Adapter -> available workers on which it is resident."""

    def available(self) -> Iterator[Worker]:
        return (worker for worker in self.workers.values() if worker.available)

    def observe(self, beats: Mapping[str, m.WorkerBeat | None], elapsed_s: float) -> list[str]:
        """Take the registered workers' latest beats, None where expired, `elapsed_s` after the last call.

        Silence counts only while it was listened for: a scheduler or a queue that stood still kills nobody.
        Returns the workers that are dead: silent too long, gone from the registry, or replaced by a new process.
        """
        for wid, beat in beats.items():
            worker = self.workers.get(wid)
            if worker is None and beat is None:
                self._silent_s[wid] = self._silent_s.get(wid, -elapsed_s) + elapsed_s
            elif worker is None and beat is not None:
                self._silent_s.pop(wid, None)
                self.workers[wid] = self._take(Worker(beat), beat)
            elif worker is not None and (beat is None or beat.sent_ms == worker.beat.sent_ms):
                worker.silent_s += elapsed_s
            elif worker is not None and beat is not None:
                worker.silent_s = 0.0
                self._take(worker, beat)
        return self._dead(beats)

    def _dead(self, registered: Collection[str]) -> list[str]:
        newest: dict[str, Worker] = {}
        for worker in self.workers.values():  # in order of appearance
            newest[worker.beat.name] = worker
        dead = [wid for wid, silent_s in self._silent_s.items() if silent_s >= self._beat_timeout_s]
        for wid, worker in self.workers.items():
            replaced = newest[worker.beat.name] is not worker and worker.silent_s >= MISSED_BEATS_S
            if worker.silent_s >= self._beat_timeout_s or replaced or wid not in registered:
                dead.append(wid)
        return dead

    def _take(self, worker: Worker, beat: m.WorkerBeat) -> Worker:
        before = worker.available, worker.beat.capacity
        worker.beat = beat
        worker.unreachable = False
        if before != (worker.available, beat.capacity) or beat.wid not in self.workers:
            self.version += 1
        worker.resident, worker.loading = frozenset(beat.resident), frozenset(beat.loading)
        worker.host = frozenset(beat.host)
        worker.model = self._usual_model() if beat.step_model == m.StepModel() else beat.step_model
        self._index(worker)
        return worker

    def _usual_model(self) -> m.StepModel:
        """Return how long steps take on a worker that knows: a new one runs the same base, likely no slower."""
        models = (worker.beat.step_model for worker in self.workers.values())
        return next((model for model in models if model != m.StepModel()), UNFITTED_STEP)

    def note_resident(self, worker: Worker, digest: str) -> None:
        """Note before the next beat says so that an adapter has come."""
        if digest not in worker.resident:
            worker.resident |= {digest}
            self._index(worker)

    def set_unreachable(self, wid: str) -> None:
        """Give a worker nothing until its next beat."""
        if worker := self.workers.get(wid):
            worker.unreachable = True
            self.version += 1
            self._index(worker)

    def remove(self, wid: str) -> None:
        """Forget a dead worker."""
        self._silent_s.pop(wid, None)
        if worker := self.workers.pop(wid, None):
            self.num_assigned -= worker.load
            worker.unreachable = True
            self.version += 1
            self._index(worker)

    def take_moved(self) -> dict[str, bool]:
        """Return the adapters that came to their first worker (True) or left their last (False) since the last call."""
        moved = {digest: digest in self.holders for digest in self._moved}
        self._moved.clear()
        return moved

    def _index(self, worker: Worker) -> None:
        """Bring `holders` up to date with what is resident on a worker."""
        held = worker.resident if worker.available else frozenset()
        for digest in worker.indexed - held:
            holders = self.holders[digest]
            holders.discard(worker.wid)
            if not holders:
                del self.holders[digest]
                self._moved.add(digest)
        for digest in held - worker.indexed:
            if digest not in self.holders:
                self._moved.add(digest)
            self.holders.setdefault(digest, set()).add(worker.wid)
        worker.indexed = held
