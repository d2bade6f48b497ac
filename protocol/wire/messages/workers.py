"""Worker to scheduler: ends and heartbeats. Scheduler to gateway: its view of the queue."""

from __future__ import annotations

import msgspec

from protocol.wire.messages.base import Packed, Wire


class Ended(Packed, frozen=True):
    """A request has ended."""

    rid: str
    wid: str  # "": the end was not written by its worker
    epoch: int
    num_output_tokens: int


class StepModel(Wire, frozen=True):
    """The duration of a step: seconds = a + b·tokens + c·kv_tokens + d·(sum of ranks of distinct adapters) + e·passes.

    Fitted online. passes: forward passes of one sequence each; packed steps have none, so their e is 0.
    """

    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 0.0

    def seconds(self, num_tokens: int, num_kv_tokens: float, sum_ranks: int, num_passes: int = 0) -> float:
        """Return the duration in seconds of a step with this work."""
        terms = self.b * num_tokens + self.c * num_kv_tokens + self.d * sum_ranks + self.e * num_passes
        return self.a + terms

    def is_worth_a_step(self, num_seqs: int, num_kv_tokens: int) -> bool:
        """Return whether decoding these sequences takes longer than the fixed cost of a step."""
        return (self.b + self.e) * num_seqs + self.c * num_kv_tokens > self.a


LOAD_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
"""Upper bounds in seconds of the buckets of adapter load times in `WorkerBeat.load_seconds`."""


class WorkerCounters(msgspec.Struct, omit_defaults=True):
    """Totals since a worker's start. The worker increments its own; a heartbeat carries a copy."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_computed_tokens: int = 0  # prompt and output tokens, recomputed ones included
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache and not computed
    num_output_tokens: int = 0
    num_drafted_tokens: int = 0  # draft tokens
    num_accepted_tokens: int = 0  # draft tokens that were accepted
    num_model_drafted_tokens: int = 0  # those of `num_drafted_tokens` that a draft model made
    num_model_accepted_tokens: int = 0  # those of `num_accepted_tokens` that a draft model made
    num_evictions: int = 0  # adapters evicted from the pool
    plan_s: float = 0.0  # choosing a step's tokens and advancing adapter loads
    draft_s: float = 0.0  # passes of the draft model; not part of any other phase
    inputs_s: float = 0.0  # building the work lists and copying them to the device
    forward_s: float = 0.0
    sample_s: float = 0.0
    mask_s: float = 0.0  # part of `sample_s` that computes grammar masks
    finish_s: float = 0.0  # stop checks and outputs
    publish_s: float = 0.0  # making steps durable and visible, while the next steps are computed


class WorkerBeat(Wire, frozen=True, kw_only=True):
    """A worker's state, sent every second and on change. Readers of its base alone decode only its beginning."""

    base: str = ""  # name of the base that it serves
    wid: str  # worker id, unique per process start
    name: str  # stable across restarts: a new wid with the same name means the old one is gone
    capacity: int  # number of requests that it can run at once
    running: int = 0
    waiting: int = 0
    waiting_adapter: int = 0  # those of `waiting` whose adapter is loading; they do not count against the capacity
    progress: list[tuple[str, int]] = []  # (rid, output tokens so far) of all requests it holds
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    pool_bytes_free: int = 0
    pool_bytes_total: int = 0
    step_model: StepModel = StepModel()
    resident: list[str] = []
    loading: list[str] = []
    host: list[str] = []
    pinned: dict[str, str] = {}  # digest to keep in the pool -> why it is not there; "": it is resident or loading
    num_loads: int = 0  # adapters copied into the pool since its start
    num_fetches: int = 0  # adapters fetched from a store
    load_seconds: dict[str, list[float]] = {}
    """Tier from which adapters were loaded (store, host) -> number of loads in each of `LOAD_BUCKETS_S` and above all
    of them, then the sum of their seconds.
    """
    kv_bytes_total: int = 0
    host_bytes_used: int = 0  # bytes of packed adapters
    host_bytes_total: int = 0
    counters: WorkerCounters = msgspec.field(default_factory=WorkerCounters)
    draining: bool = False
    sent_ms: int = 0
    knows: list[str] = []  # `requests.KNOWN_FIELDS` of its version
    version: str = ""  # release of its program
    may_become: list[str] = []  # names of other bases to which it switches when ordered
    becoming: str = ""  # the base to which it is switching; "": none
    start_s: float = 0.0  # seconds from the start of its process to its first heartbeat
    joined_ms: int = 0  # unix time when it joined
    started_with: int = 0  # number of workers that were started together, including this one; 0: unknown

    def is_of(self, base: str) -> bool:
        """Return whether the worker serves a base; "" means the only base of its fleet."""
        return base in ("", self.base)


class BaseLoad(Packed, frozen=True):
    """The load of one base, for `SchedulerStatus`."""

    workers: int = 0  # workers that may run its requests
    queued: int = 0
    running: int = 0
    may_become: int = 0  # workers of other bases that may switch to it, and those that are switching to any base


class TenantLoad(Packed, frozen=True):
    """What waits of one tenant, for `SchedulerStatus`."""

    queued: int = 0
    queued_batch: int = 0  # those of `queued` in class batch
    tokens: int = 0  # of `queued`: prompts and maximum outputs


class SchedulerStatus(Wire, frozen=True):
    """The leader's view of the queue, for admission, job positions and metrics."""

    queued: int
    running: int
    workers: int
    drain_rate: float  # requests ended per second while others waited; 0: not known yet
    queued_tokens: int = 0
    queued_batch: int = 0  # those of `queued` in class batch
    used_bytes: int = 0  # memory of the queue's server
    max_bytes: int = 0  # its memory limit; 0: no limit
    sent_ms: int = 0
    oldest_ms: dict[str, int] = {}  # class -> unix time when its oldest waiting request was submitted
    dead_letters: int = 0
    leader: str = ""  # the leader's token, "<id>:<epoch>"
    running_adapters: list[str] = []  # digests of the adapters with the most requests on workers, at most 64
    waiting_adapters: list[str] = []  # digests of the adapters with the most waiting requests, at most 64
    knows: list[str] = []  # `WorkerBeat.knows` of the newest worker
    version: str = ""  # release of its program
    drain_next: str = ""  # name of the worker to remove first when scaling in; "": there is none
    bases: dict[str, BaseLoad] = {}  # by name: bases that have workers or requests, or to which a worker may switch
    becoming: dict[str, str] = {}  # name of a worker that was ordered to switch -> name of its new base
    tenants: dict[str, TenantLoad] = {}  # by name: the 64 with the most waiting requests, and the 64 with most tokens
