"""A worker in virtual time: steps that take what the step-time model says, adapters that take their bytes to load."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from protocol.runtime.settings import SHORT_STEP_TOKENS_PER_SEQ
from protocol.wire import messages as m
from scheduler.placement import AdapterFacts, Bandwidths
from scheduler.request import BASE

SMALL_GPU_STEP = m.StepModel(a=0.02, b=5e-5, c=2e-8, d=2e-6)
"""s, and s per token, KV token and rank: about an 8-billion-parameter model on a small GPU. Assumed, not measured."""

BLOCK_TOKENS = 16
"""Of a KV block, as in `lora_kernels`, which the scheduler does not import."""


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """What a worker can do."""

    capacity: int = 64  # requests at once
    max_step_tokens: int = 2048
    step: m.StepModel = SMALL_GPU_STEP
    pool_bytes: int = 64 * 20_000_000
    host_bytes: int = 400 * 20_000_000
    bandwidths: Bandwidths = field(default_factory=Bandwidths)
    way_ms: float = 0.0  # what a request takes beside its steps, from the client to the worker and back


@dataclass(slots=True)
class Running:
    """One request of the trace on its way through a worker. Times in ms of virtual time, -1 before they happen."""

    submit: m.Submit
    num_output_tokens: int  # it will make
    epoch: int = 0
    gives_way: bool = False
    over_share: bool = False
    left_prompt: int = 0
    num_cached: int = 0  # tokens that were computed before it lost its place
    left_output: int = 0
    submitted_ms: float = 0.0
    first_ms: float = -1.0
    ended_ms: float = -1.0


class _Cache:
    """Adapters by last use, within a budget of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self.digests: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self.digests

    def touch(self, digest: str) -> None:
        if digest in self.digests:
            self.digests.move_to_end(digest)

    def make_room(self, num_bytes: int, pinned: Counter[str]) -> bool:
        """Evict what was not used longest; False, and nothing happens, when too much is pinned."""
        free = self._max_bytes - self._bytes
        leaving = []
        for digest, size in self.digests.items():
            if free >= num_bytes:
                break
            if not pinned[digest]:
                leaving.append(digest)
                free += size
        if free < num_bytes:
            return False
        for digest in leaving:
            self._bytes -= self.digests.pop(digest)
        return True

    def add(self, digest: str, num_bytes: int) -> None:
        if digest not in self.digests:
            self.digests[digest] = num_bytes
            self._bytes += num_bytes


class SimWorker:
    """Continuous batching with chunked prefill, an adapter pool and one loader, all without a model."""

    def __init__(self, wid: str, model: WorkerModel, facts: Mapping[str, AdapterFacts]) -> None:
        self.wid = wid
        self._model = model
        self._facts = facts
        self._ready: list[deque[Running]] = [deque(), deque()]  # the second one's give way
        self._blocked: dict[str, list[Running]] = {}  # digest -> requests that wait for it, in order of their coming
        self._running: dict[str, Running] = {}
        # The second ones are of what gives way, which does not go on with every step.
        self._ends: tuple[list[tuple[int, str]], ...] = ([], [])  # (number of the step after which it ends, rid)
        self._num_steps = [0, 0]
        self._kv_tokens = [0, 0]
        self._starting: list[Running] = []  # whose prompt is complete with this step
        self._pauses = False  # whether what gives way pauses in this step, or did in the last
        self._pinned: Counter[str] = Counter()
        self._pool = _Cache(model.pool_bytes)
        self._host = _Cache(model.host_bytes)
        self._fetches: deque[str] = deque()
        self.step_ends_ms: float | None = None
        self.loading: tuple[str, bool] | None = None  # digest, and whether it goes to the pool
        self.load_ends_ms = 0.0
        self.num_loads = 0
        self.num_fetches = 0
        self.busy_ms = 0.0

    def take(self, request: Running) -> None:
        """Get a request."""
        digest = request.submit.digest
        request.left_prompt = request.submit.num_prompt_tokens
        request.left_output = request.num_output_tokens
        if digest == BASE or digest in self._pool:
            self._make_ready(request)
        else:
            self._blocked.setdefault(digest, []).append(request)

    def prefetch(self, digest: str) -> None:
        """Bring an adapter to the host cache when there is nothing better to load."""
        if digest not in self._host:
            self._fetches.append(digest)

    def start_load(self, now_ms: float) -> float | None:
        """Let the loader begin its next load. Returns when that ends, None if it has none or is busy."""
        if self.loading is not None:
            return None
        bandwidths = self._model.bandwidths
        for digest in self._blocked:
            size = self._facts[digest].num_bytes
            if not self._pool.make_room(size, self._pinned):
                break
            cost_ms = bandwidths.host_ms + size / bandwidths.host
            if digest not in self._host:
                cost_ms += bandwidths.remote_ms + size / bandwidths.remote
                self.num_fetches += 1
            self.loading, self.load_ends_ms = (digest, True), now_ms + cost_ms
            return self.load_ends_ms
        while self._fetches:
            digest = self._fetches.popleft()
            if digest not in self._host and digest not in self._pool:
                self.num_fetches += 1
                cost_ms = bandwidths.remote_ms + self._facts[digest].num_bytes / bandwidths.remote
                self.loading, self.load_ends_ms = (digest, False), now_ms + cost_ms
                return self.load_ends_ms
        return None

    def end_load(self) -> None:
        """Finish the load in progress."""
        assert self.loading is not None
        digest, to_pool = self.loading
        self.loading = None
        size = self._facts[digest].num_bytes
        if self._host.make_room(size, Counter()):
            self._host.add(digest, size)
        if to_pool:
            self.num_loads += 1
            self._pool.add(digest, size)
            for request in self._blocked.pop(digest):
                self._make_ready(request)

    def start_step(self, now_ms: float) -> float | None:
        """Begin a step. Returns when it ends, None if there is nothing to do or one is in progress."""
        if self.step_ends_ms is not None or not (self._running or any(self._ready)):
            return None
        model, step = self._model, self._model.step
        self._make_room()
        self._pauses = (
            not self._pauses
            and bool(self._ready[False])
            and len(self._running) < model.capacity
            and step.is_worth_a_step(len(self._ends[True]), self._kv_tokens[True])
        )
        classes = (False,) if self._pauses else (False, True)
        max_tokens = model.max_step_tokens, min(model.max_step_tokens, SHORT_STEP_TOKENS_PER_SEQ * model.capacity)
        num_tokens = sum(len(self._ends[gives_way]) for gives_way in classes)
        adapters = {r.submit.digest for r in self._running.values() if r.gives_way in classes}
        for gives_way in classes:
            ready = self._ready[gives_way]
            while (
                ready
                and num_tokens < max_tokens[gives_way]
                and len(self._running) + len(self._starting) < model.capacity
            ):
                request = ready[0]
                chunk = min(max_tokens[gives_way] - num_tokens, request.left_prompt)
                request.left_prompt -= chunk
                num_tokens += chunk
                self._kv_tokens[gives_way] += chunk
                adapters.add(request.submit.digest)
                if request.left_prompt:
                    break
                self._starting.append(ready.popleft())
        rank = sum(self._facts[digest].rank for digest in adapters if digest != BASE)
        num_kv_tokens = sum(self._kv_tokens[gives_way] for gives_way in classes)
        step_ms = 1000 * step.seconds(num_tokens, num_kv_tokens, rank)
        self.busy_ms += step_ms
        self.step_ends_ms = now_ms + step_ms
        return self.step_ends_ms

    def _make_room(self) -> None:
        """Let those who wait take places from those over their share, whose whole blocks stay in the prefix cache."""
        num_places = len(self._running) + len(self._ready[False]) - self._model.capacity
        if num_places <= 0:
            return
        num_places = min(num_places, sum(not request.over_share for request in self._ready[False]))
        for request in [r for r in reversed(self._running.values()) if r.over_share][:num_places]:
            ends, rid = self._ends[request.gives_way], request.submit.rid
            end = next(end for end in ends if end[1] == rid)
            ends.remove(end)
            heapify(ends)
            request.left_output = end[0] - self._num_steps[request.gives_way]
            num_tokens = request.submit.num_prompt_tokens + request.num_output_tokens - request.left_output
            request.left_prompt = 1 + (num_tokens - 1) % BLOCK_TOKENS
            request.num_cached = num_tokens - request.left_prompt
            self._kv_tokens[request.gives_way] -= num_tokens - 1
            del self._running[rid]
            self._ready[request.gives_way].appendleft(request)
        self._ready[False] = deque(sorted(self._ready[False], key=lambda request: request.over_share))

    def end_step(self, now_ms: float) -> list[Running]:
        """Finish the step in progress. Returns the requests that end with it."""
        self.step_ends_ms = None
        classes = (False,) if self._pauses else (False, True)
        for gives_way in classes:
            self._num_steps[gives_way] += 1
            self._kv_tokens[gives_way] += len(self._ends[gives_way])
        for request in self._starting:
            if request.first_ms < 0:
                request.first_ms = now_ms + self._model.way_ms
            self._running[request.submit.rid] = request
            self._kv_tokens[request.gives_way] += request.num_cached
            last = self._num_steps[request.gives_way] + request.left_output - 1
            heappush(self._ends[request.gives_way], (last, request.submit.rid))
        self._starting.clear()
        ended: list[Running] = []
        for gives_way in classes:
            ends = self._ends[gives_way]
            while ends and ends[0][0] <= self._num_steps[gives_way]:
                request = self._running.pop(heappop(ends)[1])
                request.ended_ms = now_ms + self._model.way_ms
                self._kv_tokens[gives_way] -= request.submit.num_prompt_tokens + request.num_output_tokens - 1
                self._pinned[request.submit.digest] -= 1
                ended.append(request)
        return ended

    def beat(self, now_ms: float) -> m.WorkerBeat:
        """Report as a worker does."""
        lengths = {
            rid: end - num_steps
            for ends, num_steps in zip(self._ends, self._num_steps, strict=True)
            for end, rid in ends
        }
        waiting = [*self._ready[False], *self._ready[True], *self._starting]
        blocked = [request for requests in self._blocked.values() for request in requests]
        progress = [(rid, r.num_output_tokens - lengths[rid]) for rid, r in self._running.items()]
        return m.WorkerBeat(
            wid=self.wid,
            name=self.wid,
            capacity=self._model.capacity,
            running=len(self._running),
            waiting=len(waiting) + len(blocked),
            waiting_adapter=len(blocked),
            progress=progress + [(request.submit.rid, 0) for request in (*waiting, *blocked)],
            step_model=self._model.step,
            resident=list(self._pool.digests),
            loading=[self.loading[0]] if self.loading and self.loading[1] else [],
            host=list(self._host.digests),
            sent_ms=round(now_ms) + 1,
        )

    def _make_ready(self, request: Running) -> None:
        digest = request.submit.digest
        self._pinned[digest] += 1
        self._pool.touch(digest)
        self._ready[request.gives_way].append(request)
