"""The workers: which are alive, what each holds, and how many requests each may get, by their heartbeats. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from protocol.wire import messages as m
from protocol.wire.keys import BATCH
from scheduler.request import BASE, QueuedRequest

QUEUED_AHEAD = 2
"""Requests that a worker may have above its capacity, so that it never waits for the next one."""

RESERVED_ONE_IN = 8
"""One slot in this many of a worker is reserved: requests that yield leave it free."""

RESERVED_FROM_BATCH_ONE_IN = 4
"""The same for batch work."""

MAX_LOADS = 8
"""Maximum number of adapters loading on a worker for requests already assigned to it."""

MISSED_BEATS_S = 1.5
"""Seconds without a heartbeat after which a worker whose name has returned under a new id counts as dead."""

UNFITTED_STEP = m.StepModel(a=0.02, b=0.0005, d=1e-6)
"""Step times assumed, in seconds, until a worker has fitted its own."""


class Tier(IntEnum):
    """Location of an adapter relative to a worker, nearest first."""

    RESIDENT = 0
    LOADING = 1
    HOST = 2
    REMOTE = 3


def num_reserved(capacity: int, one_in: int = RESERVED_ONE_IN) -> int:
    """Return how many of a worker's slots are reserved: at least one, but never all."""
    return min(max(1, capacity // one_in), capacity - 1)


@dataclass(slots=True)
class Worker:
    """One worker process. Its requests are counted here from assignment to end."""

    beat: m.WorkerBeat
    silent_s: float = 0.0
    unreachable: bool = False  # whether its work stream was missing at the last assignment
    resident: frozenset[str] = frozenset()
    loading: frozenset[str] = frozenset()
    host: frozenset[str] = frozenset()
    knows: frozenset[str] = frozenset()  # fields of requests that it supports; older workers would ignore new ones
    indexed: frozenset[str] = frozenset()  # adapters for which `Workers.holders` lists it
    model: m.StepModel = UNFITTED_STEP
    requests: dict[str, QueuedRequest] = field(default_factory=dict[str, QueuedRequest])
    num_ready: int = 0  # requests whose adapter is resident; each takes a slot
    num_yielding: int = 0  # requests that yield
    num_ready_yielding: int = 0  # those of `num_ready` that yield, whose slots others may take
    num_ready_batch: int = 0  # those of `num_ready_yielding` in class batch, whose slots other yielding ones may take
    by_digest: Counter[str] = field(default_factory=Counter[str])
    cold: Counter[str] = field(default_factory=Counter[str])  # digest -> requests that wait for that adapter
    suspects: Counter[int] = field(default_factory=Counter[int])  # attempts -> suspects without progress here
    ranks: dict[str, int] = field(default_factory=dict[str, int])  # rank of each distinct adapter of its requests
    rank_sum: int = 0
    num_tokens: int = 0  # prompt and expected output tokens of its requests
    prefill_until_ms: float = 0.0  # estimated unix ms when its assigned prompts are computed

    @property
    def wid(self) -> str:
        """The worker's id."""
        return self.beat.wid

    @property
    def load(self) -> int:
        """Number of its requests."""
        return len(self.requests)

    @property
    def num_cold(self) -> int:
        """Number of requests that wait for their adapter and take no slot."""
        return len(self.requests) - self.num_ready

    @property
    def available(self) -> bool:
        """Whether it may get requests."""
        return not self.beat.draining and not self.unreachable and self.beat.capacity > 0

    def understands(self, request: QueuedRequest) -> bool:
        """Return whether it supports every field that a request uses."""
        return self.knows.issuperset(request.submit.needs)

    def tier(self, digest: str) -> Tier:
        """Return the location of an adapter."""
        if digest == BASE or digest in self.resident:
            return Tier.RESIDENT
        if digest in self.loading or digest in self.cold:
            return Tier.LOADING
        return Tier.HOST if digest in self.host else Tier.REMOTE

    def ready_credit(self, cls: str, *, yields: bool = False) -> int:
        """Return how many more requests with a resident adapter it may get; 0 or less: none."""
        beat = self.beat
        may_take_places = self.num_in_front(cls, yields=yields) < self.num_ready
        has_few_blocks = beat.kv_blocks_free * 16 < beat.kv_blocks_total
        if has_few_blocks and beat.waiting > beat.waiting_adapter and not may_take_places:
            return 0  # the limit is memory, not the number of requests
        if self._leaves_room(cls, yields):
            return self._unreserved_places(cls) - self.num_ready
        return beat.capacity + QUEUED_AHEAD - self.num_in_front(cls, yields=yields)

    def num_in_front(self, cls: str, *, yields: bool) -> int:
        """Return how many requests another one would wait for if all slots were taken."""
        if cls == BATCH:
            return self.num_ready
        return self.num_ready - (self.num_ready_batch if yields else self.num_ready_yielding)

    def takes_cold(self, digest: str, cls: str, *, yields: bool = False) -> bool:
        """Return whether it may get a request that has to wait there for the adapter `digest`."""
        max_loads = MAX_LOADS
        if self._leaves_room(cls, yields):
            if self.load >= self._unreserved_places(cls):
                return False  # requests that wait for one adapter get their slots together
            max_loads = MAX_LOADS // 2
        return (digest in self.cold or len(self.cold) < max_loads) and self.num_cold < self.beat.capacity

    def _leaves_room(self, cls: str, yields: bool) -> bool:
        """Return whether a request must leave slots and loads free: batch work, and one that yields beside others."""
        return cls == BATCH or (yields and self.num_yielding < len(self.requests))

    def _unreserved_places(self, cls: str) -> int:
        one_in = RESERVED_FROM_BATCH_ONE_IN if cls == BATCH else RESERVED_ONE_IN
        return self.beat.capacity - num_reserved(self.beat.capacity, one_in)

    def step_s(self, request: QueuedRequest, num_tokens: int, rank: int) -> float:
        """Predict the seconds of its steps with `request` added, which has `num_tokens` and an adapter of `rank`."""
        more = 0 if request.submit.digest in self.by_digest else rank
        num = len(self.requests) + 1
        return self.model.seconds(num, self.num_tokens + num_tokens, self.rank_sum + more, num)


class Workers:
    """All known workers, including dead ones until they are removed."""

    def __init__(self, beat_timeout_s: float) -> None:
        self._beat_timeout_s = beat_timeout_s
        self.by_id: dict[str, Worker] = {}
        self._silent_s: dict[str, float] = {}  # wid -> seconds of silence of a registered worker that was never heard
        self._moved: set[str] = set()  # adapters that have become resident on a first worker or left the last one
        self.version = 0
        """Changes when the available workers or their capacities change."""
        self.num_assigned = 0
        """Number of requests on all workers."""
        self.bases: tuple[str, ...] = ()
        """The names of the fleet's bases."""
        self.removed: frozenset[str] = frozenset()
        """Bases that operators have removed: no worker becomes one, whatever its settings say."""
        self.holders: dict[str, set[str]] = {}
        """Adapter -> available workers on which it is resident."""

    def base_of(self, name: str) -> str:
        """Return the base that a name in a request or heartbeat refers to; "" for the only base of a fleet.

        In a fleet of one base every name refers to that base, so that its requests also run on workers that have
        returned with another name. A removed base keeps its name.
        """
        return name if len(self.bases) > 1 or name in self.removed else ""

    def set_bases(self, names: Sequence[str]) -> None:
        """Set the names of the fleet's bases."""
        if self.bases != tuple(names):
            self.bases = tuple(names)
            self.version += 1

    def available(self) -> Iterator[Worker]:
        """Return the workers that may get requests."""
        return (worker for worker in self.by_id.values() if worker.available)

    def observe(self, beats: Mapping[str, m.WorkerBeat | None], elapsed_s: float) -> list[str]:
        """Process the latest heartbeats of registered workers, None for expired ones. Returns the dead workers' ids.

        elapsed_s: seconds since the last call. Silence counts only while the scheduler listens: a pause of the
        scheduler or the queue does not kill workers. A worker is dead if it is silent too long, no longer registered,
        or replaced by a new process.
        """
        for wid, beat in beats.items():
            worker = self.by_id.get(wid)
            if worker is None and beat is None:
                self._silent_s[wid] = self._silent_s.get(wid, -elapsed_s) + elapsed_s
            elif worker is None and beat is not None:
                self._silent_s.pop(wid, None)
                self.by_id[wid] = self._take_beat(Worker(beat), beat)
            elif worker is not None and (beat is None or beat.sent_ms == worker.beat.sent_ms):
                worker.silent_s += elapsed_s
            elif worker is not None and beat is not None:
                worker.silent_s = 0.0
                self._take_beat(worker, beat)
        return self._dead(beats)

    def _dead(self, registered: Collection[str]) -> list[str]:
        newest: dict[str, Worker] = {}
        for worker in self.by_id.values():  # in order of appearance
            newest[worker.beat.name] = worker
        dead = [wid for wid, silent_s in self._silent_s.items() if silent_s >= self._beat_timeout_s]
        for wid, worker in self.by_id.items():
            replaced = newest[worker.beat.name] is not worker and worker.silent_s >= MISSED_BEATS_S
            if worker.silent_s >= self._beat_timeout_s or replaced or wid not in registered:
                dead.append(wid)
        return dead

    def _take_beat(self, worker: Worker, beat: m.WorkerBeat) -> Worker:
        before = worker.available, worker.beat.capacity
        worker.beat = beat
        worker.unreachable = False
        if before != (worker.available, beat.capacity) or beat.wid not in self.by_id:
            self.version += 1
        worker.resident, worker.loading = frozenset(beat.resident), frozenset(beat.loading)
        worker.host, worker.knows = frozenset(beat.host), frozenset(beat.knows)
        worker.model = self._usual_model(beat.base) if beat.step_model == m.StepModel() else beat.step_model
        self._index(worker)
        return worker

    def _usual_model(self, base: str) -> m.StepModel:
        """Return the fitted step model of another worker of a base: a new worker of it is likely no slower."""
        models = (worker.beat.step_model for worker in self.by_id.values() if worker.beat.base == base)
        return next((model for model in models if model != m.StepModel()), UNFITTED_STEP)

    def note_resident(self, worker: Worker, digest: str) -> None:
        """Record that an adapter has become resident, before the worker's next heartbeat reports it."""
        if digest not in worker.resident:
            worker.resident |= {digest}
            self._index(worker)

    def set_unreachable(self, wid: str) -> None:
        """Assign nothing to a worker until its next heartbeat."""
        if worker := self.by_id.get(wid):
            worker.unreachable = True
            self.version += 1
            self._index(worker)

    def remove(self, wid: str) -> None:
        """Forget a dead worker."""
        self._silent_s.pop(wid, None)
        if worker := self.by_id.pop(wid, None):
            self.num_assigned -= worker.load
            worker.unreachable = True
            self.version += 1
            self._index(worker)

    def take_moved(self) -> dict[str, bool]:
        """Return the adapters that became resident anywhere (True) or nowhere (False) since the last call."""
        moved = {digest: digest in self.holders for digest in self._moved}
        self._moved.clear()
        return moved

    def _index(self, worker: Worker) -> None:
        """Update `holders` with the resident adapters of a worker."""
        held = worker.resident if worker.available else frozenset[str]()
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
