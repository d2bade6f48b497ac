"""Worker to scheduler: ends and heartbeats. Scheduler to gateway: its view of the queue."""

from __future__ import annotations

import msgspec

from protocol.wire.messages.base import Packed, Wire


class Ended(Packed, frozen=True):
    """A request has ended."""

    rid: str
    wid: str  # "" for an end that its worker did not write
    epoch: int
    num_output_tokens: int


class StepModel(Wire, frozen=True):
    """Seconds of a step = a + b·tokens + c·kv_tokens + d·(sum of ranks over distinct adapters) + e·passes.

    Fitted online. passes: forward passes of one sequence, of which packed steps have none: their e is 0.
    """

    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 0.0

    def seconds(self, num_tokens: int, num_kv_tokens: float, sum_ranks: int, num_passes: int = 0) -> float:
        """Return how long a step with this work takes, in seconds."""
        terms = self.b * num_tokens + self.c * num_kv_tokens + self.d * sum_ranks + self.e * num_passes
        return self.a + terms

    def is_worth_a_step(self, num_seqs: int, num_kv_tokens: int) -> bool:
        """Return whether the decodes of sequences take longer than the fixed cost of a step."""
        return (self.b + self.e) * num_seqs + self.c * num_kv_tokens > self.a


LOAD_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
"""Upper bounds of how long adapters took to load, in `WorkerBeat.load_seconds`."""


class WorkerCounters(msgspec.Struct, omit_defaults=True):
    """Totals since a worker's start. The worker adds to its own; a heartbeat carries a copy."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_computed_tokens: int = 0  # prompt and output tokens, recomputed ones included
    num_cached_tokens: int = 0  # found in the prefix cache instead
    num_output_tokens: int = 0
    num_drafted_tokens: int = 0  # drafted by speculation
    num_accepted_tokens: int = 0  # accepted tokens among them
    num_model_drafted_tokens: int = 0  # of `num_drafted_tokens`, those of the draft model
    num_model_accepted_tokens: int = 0  # accepted tokens among these
    num_evictions: int = 0  # adapters that left the pool for others
    plan_s: float = 0.0  # choosing the step's tokens, advancing adapter loads
    draft_s: float = 0.0  # passes of the draft model, part of no other phase
    inputs_s: float = 0.0  # building and sending the work lists
    forward_s: float = 0.0
    sample_s: float = 0.0
    mask_s: float = 0.0  # part of `sample_s` for computing token masks of grammars
    finish_s: float = 0.0  # stop checks and outputs
    publish_s: float = 0.0  # making steps durable and visible, while the next ones are computed


class WorkerBeat(Wire, frozen=True, kw_only=True):
    """A worker's state, once a second and on change. Who asks which bases live workers serve reads its beginning."""

    base: str = ""  # name of the base that it serves
    wid: str  # unique per process start
    name: str  # stable across restarts: a new wid with the same name means the old one is gone
    capacity: int  # requests it would hold at once
    running: int = 0
    waiting: int = 0
    waiting_adapter: int = 0  # those of `waiting` whose adapter is loading; they take no capacity
    progress: list[tuple[str, int]] = []  # (rid, output tokens so far) of all requests it holds
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    pool_bytes_free: int = 0
    pool_bytes_total: int = 0
    step_model: StepModel = StepModel()
    resident: list[str] = []
    loading: list[str] = []
    host: list[str] = []
    pinned: dict[str, str] = {}  # digest to keep in the pool -> why it is not there, "" if it is or is coming
    num_loads: int = 0  # adapters copied into the pool since its start
    num_fetches: int = 0  # adapters fetched from a store
    load_seconds: dict[str, list[float]] = {}
    """Where adapters came from (store, host) -> of its loads, how many are in each of `LOAD_BUCKETS_S` and beyond, and
    the sum of their seconds."""
    kv_bytes_total: int = 0
    host_bytes_used: int = 0  # bytes of packed adapters
    host_bytes_total: int = 0
    counters: WorkerCounters = msgspec.field(default_factory=WorkerCounters)
    draining: bool = False
    sent_ms: int = 0
    knows: list[str] = []  # `requests.KNOWN_FIELDS` of its version
    version: str = ""  # version of its program
    may_become: list[str] = []  # names of other bases that it serves when ordered to
    becoming: str = ""  # the one of them that it is leaving for
    start_s: float = 0.0  # seconds from the start of its process to its first heartbeat
    joined_ms: int = 0  # unix time when it joined
    started_with: int = 0  # workers that were started together, it among them; 0: not known

    def is_of(self, base: str) -> bool:
        """Return whether it is a worker of a base; "" is the only one of its fleet."""
        return base in ("", self.base)


class BaseLoad(Packed, frozen=True):
    """A base in `SchedulerStatus`."""

    workers: int = 0  # that may get its requests
    queued: int = 0
    running: int = 0
    may_become: int = 0  # workers of other bases that may become it, and those that are becoming a base


class SchedulerStatus(Wire, frozen=True):
    """The leader's view, for admission, job positions and metrics."""

    queued: int
    running: int
    workers: int
    drain_rate: float  # requests finished per second while others waited; 0: not known yet
    queued_tokens: int = 0
    queued_batch: int = 0  # those of `queued` in class batch
    used_bytes: int = 0  # memory of the queue's server
    max_bytes: int = 0  # its memory limit; 0: no limit
    sent_ms: int = 0
    oldest_ms: dict[str, int] = {}  # class -> unix time when the oldest request that waits was submitted
    dead_letters: int = 0
    leader: str = ""  # its token, "<id>:<epoch>"
    running_adapters: list[str] = []  # digests of the adapters with most requests on workers, at most 64
    waiting_adapters: list[str] = []  # the same of requests that wait
    knows: list[str] = []  # `WorkerBeat.knows` of the newest worker
    version: str = ""  # version of its program
    drain_next: str = ""  # name of the worker that should go first when there are to be fewer; "": none is there
    bases: dict[str, BaseLoad] = {}  # by name, those that have workers or requests, or that a worker may become
    becoming: dict[str, str] = {}  # names of workers that have been ordered to become a base -> that base
