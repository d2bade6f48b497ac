"""A worker in virtual time: the step-time model gives the length of steps, and adapters' sizes that of their loads."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from gpu_worker.planning.step_limit import SHORT_STEP_TOKENS_PER_SEQ, SHORT_STEPS_AFTER
from protocol.runtime.settings import BLOCK_TOKENS
from protocol.wire import messages as m
from scheduler.placement import AdapterFacts, Bandwidths
from scheduler.request import BASE

SMALL_GPU_STEP = m.StepModel(a=0.02, b=5e-5, c=2e-8, d=2e-6)
"""s, and s per token, KV token and rank: roughly an 8-billion-parameter model on a small GPU. Assumed, not measured."""


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """The sizes and speeds of a worker."""

    capacity: int = 64  # maximum number of requests that run at once
    max_step_tokens: int = 2048
    step: m.StepModel = SMALL_GPU_STEP
    pool_bytes: int = 64 * 20_000_000
    host_bytes: int = 400 * 20_000_000
    bandwidths: Bandwidths = field(default_factory=Bandwidths)
    way_ms: float = 0.0  # time of a request outside its steps, from the client to the worker and back


@dataclass(slots=True)
class SimulatedRequest:
    """One request of the trace on its way through a worker. Times are in ms of virtual time, -1 before they happen."""

    submit: m.RequestHead
    num_output_tokens: int  # that it will generate
    epoch: int = 0
    yields: bool = False
    left_prompt: int = 0  # prompt tokens still to prefill
    num_cached: int = 0  # tokens computed before a preemption, found in the prefix cache
    left_output: int = 0
    submitted_ms: float = 0.0
    first_ms: float = -1.0
    ended_ms: float = -1.0


@dataclass(slots=True)
class _Group:
    """A worker's yielding requests, or all others. Yielding requests do not take part in every step."""

    ready: deque[SimulatedRequest] = field(default_factory=deque[SimulatedRequest])  # still to prefill
    ends: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])  # heap: (step that ends it, rid)
    num_steps: int = 0
    num_kv_tokens: int = 0


class _AdapterLru:
    """Adapters ordered by last use, within a budget of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self.digests: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self.digests

    def touch(self, digest: str) -> None:
        """Mark an adapter as used now."""
        if digest in self.digests:
            self.digests.move_to_end(digest)

    def make_room(self, num_bytes: int, pinned: Counter[str]) -> bool:
        """Evict the least recently used adapters. Return False, and evict none, if too much is pinned."""
        free = self._max_bytes - self._bytes
        leaving: list[str] = []
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
        """Add an adapter, for which there must be room."""
        if digest not in self.digests:
            self.digests[digest] = num_bytes
            self._bytes += num_bytes


class SimWorker:
    """A worker's continuous batching with chunked prefill, adapter pool and single loader, without a model.

    Yielding requests are treated as in `gpu_worker.planning.batcher`, except for the limit on steps.
    """

    def __init__(self, wid: str, model: WorkerModel, facts: Mapping[str, AdapterFacts]) -> None:
        self.wid = wid
        self._model = model
        self._facts = facts
        self._others, self._yielding = _Group(), _Group()
        self._blocked: dict[str, list[SimulatedRequest]] = {}  # digest -> requests that wait for it, in order
        self._running: dict[str, SimulatedRequest] = {}
        self._num_others = 0  # requests on this worker that do not yield
        self._starting: list[SimulatedRequest] = []  # requests whose prefill ends with this step
        self._pauses = False  # whether the yielding group is left out of this step, or was left out of the last one
        self._short_steps = 0  # steps until yielding prompts are computed in long steps again
        self._pinned: Counter[str] = Counter()
        self._pool = _AdapterLru(model.pool_bytes)
        self._host = _AdapterLru(model.host_bytes)
        self._fetches: deque[str] = deque()
        self.step_ends_ms: float | None = None
        self.loading: tuple[str, bool] | None = None  # digest, and whether it is loaded into the pool
        self.load_ends_ms = 0.0
        self.num_loads = 0
        self.num_fetches = 0
        self.busy_ms = 0.0

    def take(self, request: SimulatedRequest) -> None:
        """Add an assigned request."""
        digest = request.submit.digest
        self._num_others += not request.yields
        request.left_prompt = request.submit.num_prompt_tokens
        request.left_output = request.num_output_tokens
        if digest == BASE or digest in self._pool:
            self._make_ready(request)
        else:
            self._blocked.setdefault(digest, []).append(request)

    def prefetch(self, digest: str) -> None:
        """Load an adapter into the host cache once no request waits for another one."""
        if digest not in self._host:
            self._fetches.append(digest)

    def start_load(self, now_ms: float) -> float | None:
        """Start the loader's next load. Return when it ends, in ms; None if there is none or the loader is busy."""
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
        """Start a step. Return when it ends, in ms; None if there is nothing to do or one is in progress."""
        has_work = self._running or self._others.ready or self._yielding.ready
        if self.step_ends_ms is not None or not has_work:
            return None
        model = self._model
        self._take_places()
        self._short_steps = SHORT_STEPS_AFTER if self._num_others else self._short_steps - 1
        self._pauses = self._should_pause()
        groups = self._active_groups()
        adapters = {r.submit.digest for r in self._running.values() if not (r.yields and self._pauses)}
        num_tokens = sum(len(group.ends) for group in groups)
        for group in groups:
            max_tokens = model.max_step_tokens
            if group is self._yielding and self._short_steps > 0:
                max_tokens = min(max_tokens, SHORT_STEP_TOKENS_PER_SEQ * model.capacity)
            num_tokens += self._prefill(group, max_tokens - num_tokens, adapters)
        num_kv_tokens = sum(group.num_kv_tokens for group in groups)
        rank = sum(self._facts[digest].rank for digest in adapters if digest != BASE)
        step_ms = 1000 * model.step.seconds(num_tokens, num_kv_tokens, rank)
        self.busy_ms += step_ms
        self.step_ends_ms = now_ms + step_ms
        return self.step_ends_ms

    def _should_pause(self) -> bool:
        """Return whether the yielding group is left out of this step, because it has another prompt."""
        return (
            not self._pauses
            and bool(self._others.ready)
            and len(self._running) < self._model.capacity
            and self._model.step.is_worth_a_step(len(self._yielding.ends), self._yielding.num_kv_tokens)
        )

    def _active_groups(self) -> tuple[_Group, ...]:
        """Return the groups that take part in this step."""
        return (self._others,) if self._pauses else (self._others, self._yielding)

    def _group(self, request: SimulatedRequest) -> _Group:
        return self._yielding if request.yields else self._others

    def _prefill(self, group: _Group, budget: int, adapters: set[str]) -> int:
        """Prefill a group's prompts within `budget` tokens. Add their adapters to `adapters`; return the tokens."""
        num_tokens = 0
        while group.ready and num_tokens < budget and len(self._running) + len(self._starting) < self._model.capacity:
            request = group.ready[0]
            chunk = min(budget - num_tokens, request.left_prompt)
            request.left_prompt -= chunk
            num_tokens += chunk
            adapters.add(request.submit.digest)
            if request.left_prompt:
                break
            self._starting.append(group.ready.popleft())
        group.num_kv_tokens += num_tokens
        return num_tokens

    def _take_places(self) -> None:
        """Preempt the latest yielding requests for others without a slot; full blocks stay in the prefix cache."""
        num_lacking = min(len(self._running) + len(self._others.ready) - self._model.capacity, len(self._others.ready))
        group = self._yielding
        for request in [r for r in reversed(self._running.values()) if r.yields][: max(0, num_lacking)]:
            rid = request.submit.rid
            end = next(end for end in group.ends if end[1] == rid)
            group.ends.remove(end)
            heapify(group.ends)
            request.left_output = end[0] - group.num_steps
            num_tokens = request.submit.num_prompt_tokens + request.num_output_tokens - request.left_output
            request.left_prompt = 1 + (num_tokens - 1) % BLOCK_TOKENS
            request.num_cached = num_tokens - request.left_prompt
            group.num_kv_tokens -= num_tokens - 1
            del self._running[rid]
            group.ready.appendleft(request)

    def end_step(self, now_ms: float) -> list[SimulatedRequest]:
        """Finish the step in progress. Return the requests that end with it."""
        self.step_ends_ms = None
        groups = self._active_groups()
        for group in groups:
            group.num_steps += 1
            group.num_kv_tokens += len(group.ends)
        for request in self._starting:
            group = self._group(request)
            if request.first_ms < 0:
                request.first_ms = now_ms + self._model.way_ms
            self._running[request.submit.rid] = request
            group.num_kv_tokens += request.num_cached
            heappush(group.ends, (group.num_steps + request.left_output - 1, request.submit.rid))
        self._starting.clear()
        return [request for group in groups for request in self._end_requests(group, now_ms)]

    def _end_requests(self, group: _Group, now_ms: float) -> list[SimulatedRequest]:
        """Remove and return the requests of a group whose last token this step computed."""
        ended: list[SimulatedRequest] = []
        while group.ends and group.ends[0][0] <= group.num_steps:
            request = self._running.pop(heappop(group.ends)[1])
            request.ended_ms = now_ms + self._model.way_ms
            group.num_kv_tokens -= request.submit.num_prompt_tokens + request.num_output_tokens - 1
            self._pinned[request.submit.digest] -= 1
            self._num_others -= not request.yields
            ended.append(request)
        return ended

    def beat(self, now_ms: float) -> m.WorkerBeat:
        """Return the heartbeat of a worker in this state."""
        lengths = {rid: end - group.num_steps for group in (self._others, self._yielding) for end, rid in group.ends}
        waiting = [*self._others.ready, *self._yielding.ready, *self._starting]
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

    def _make_ready(self, request: SimulatedRequest) -> None:
        digest = request.submit.digest
        self._pinned[digest] += 1
        self._pool.touch(digest)
        self._group(request).ready.append(request)
