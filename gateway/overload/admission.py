"""Which calls this gateway accepts. Pure: measurements, status and time are arguments.

A call is accepted or refused at once; an accepted one is never dropped for load. Two limits are the gateway's own:
calls in flight, and the lag of its event loop. Three are the queue's: waiting requests, waiting tokens, and its
server's memory. The last limit is the predicted time to the first token: the time as an inbound call, and the wait for
the requests ahead.

No tenant (without keys: no model) fills the queue: its waiting requests and tokens may be at most eight times what a
call leaves free for all, so that others find room. From half of a limit on, those of inbound calls count too. As the
scheduler takes turns between tenants, only a tenant's own requests, and as many of each other tenant, count as ahead of
its next one. Tenants' weights are not known here.

The queue's script counts requests exactly. The gateway knows the scheduler's status, sent once a second, and its own
submissions since. A refusal by the script costs as much as an accepted call. So the length of a nearly full queue is
forecast from its last count, the drain rate, and this gateway's calls since.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.overload.call_load import CallLoad
from gateway.overload.cost import COST, RequestCost
from gateway.overload.inbound import Inbound
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.clock import now_s
from protocol.wire.errors import BadRequest, Overloaded, QueueFull
from protocol.wire.keys import BATCH, CLASSES, INTERACTIVE

ROOM = 0.1
"""Share of a limit that should be free before a refused client retries; it determines Retry-After."""

NEARLY_FULL = 1 - ROOM
"""Share of `max_queued` above which the queue's length is forecast. Below it, no call is refused because it is full."""

SHARE = 8
"""Maximum ratio of what waits of one tenant to what is free of a limit: `n` tenants that send all they can get
`8 / (8 * n + 1)` of it each. Choudhury and Hahne, Dynamic Queue Length Thresholds, 1998."""

INBOUND_FROM = 0.5
"""Share of a limit from which inbound calls count as waiting: an idle fleet takes them as fast as they come."""

MAX_NEW_TENANTS = 256
"""Maximum tenants that are looked through for a prediction besides those of the status. Of more, each has few."""

MIN_RETRY_S = 1.0
UNKNOWN_RETRY_S = 5.0
"""Retry-After, in seconds, while the fleet's drain rate is unknown."""

MAX_MEMORY_SHARE = 0.9
"""Share of the queue's memory above which calls are refused: running requests need the rest for their output."""

_NOTHING = m.TenantLoad()
_OWN = "of the same tenant (without keys: of the same model); its limit is now"

STATUS_LIFE_MS = 5000
"""Milliseconds for which submitted requests are counted here if no status arrives that includes them."""


@dataclass(frozen=True, slots=True)
class OverloadLimits:
    """Limits of a gateway that operators cannot set."""

    max_lag_s: float = 2.0  # maximum lag of the event loop
    max_inbound_s: float = 5.0  # maximum time from arrival to the queue; slower calls would time out before it
    min_inbound: int = 128  # inbound calls below which that time is not estimated
    inbound_span_s: float = 1.5  # minimum period over which the rate of inbound calls is measured


@dataclass(slots=True)
class _Queue:
    """This gateway's knowledge of one class's queue."""

    counted_ms: int = 0
    num_counted: int = 0  # requests queued at that time, without `num_new`
    num_new: int = 0  # submitted by this gateway since the scheduler's status
    new_of: Counter[str] = field(default_factory=Counter[str])  # tenant -> its part of `num_new`
    num_inbound: int = 0  # this gateway's inbound calls whose class is known
    num_inbound_requests: int = 0  # requests of these calls
    inbound_of: Counter[str] = field(default_factory=Counter[str])  # tenant -> its part of them


class Admission:
    """Admission control of one gateway's calls."""

    def __init__(
        self,
        settings: Settings,
        status: Callable[[], m.SchedulerStatus | None],
        lag_s: Callable[[], float],
        limits: OverloadLimits | None = None,
        now_s: Callable[[], float] = now_s,
    ) -> None:
        """status: returns the scheduler's latest; lag_s: returns the event loop's lag; now_s: returns unix time."""
        self._settings = settings
        self._status = status
        self._lag_s = lag_s
        self._limits = limits or OverloadLimits()
        self._now_s = now_s
        self._queues = {cls: _Queue() for cls in CLASSES}
        self._new: deque[tuple[int, CallLoad]] = deque()  # (unix ms, load) submitted since the status, oldest first
        self._num_new_tokens = 0
        self._new_tokens: Counter[str] = Counter()  # tenant -> its part of them
        self._num_inbound_tokens = 0
        self._inbound_tokens: Counter[str] = Counter()  # tenant -> its part of them
        self._inbound = Inbound(self._limits.min_inbound, self._limits.inbound_span_s)
        self._num_in_flight = 0

    # ------------------------------------------------------------ the life of a call

    @property
    def num_in_flight(self) -> int:
        """Calls that this gateway is answering."""
        return self._num_in_flight

    def enter(self) -> None:
        """Count the current task's call as in flight until `leave`, and as inbound until `leave_inbound`."""
        cost = COST.get()
        assert cost is not None
        assert not cost.is_open
        cost.is_open = cost.is_inbound = True
        self._num_in_flight += 1
        self._inbound.begin(self._now_s())

    def leave(self) -> None:
        """Stop counting the current task's call as in flight, if it was counted."""
        cost = COST.get()
        if cost is not None and cost.is_open:
            self.leave_inbound()
            cost.is_open = False
            self._num_in_flight -= 1

    def leave_inbound(self, *, reached_queue: bool = False) -> None:
        """Stop counting the current task's call as inbound: it `reached_queue`, waits for something else, or ends."""
        cost = COST.get()
        if cost is None or not cost.is_inbound:
            return
        cost.is_inbound = False
        self._inbound.end(self._now_s(), reached_queue=reached_queue)
        self._count_inbound(cost, None)

    def submitted(self, load: CallLoad) -> None:
        """Count a load that the queue has accepted."""
        now_ms = self._now_ms()
        self._forget(now_ms - STATUS_LIFE_MS)
        self._new.append((now_ms, load))
        self._queues[load.cls].num_new += load.num
        self._queues[load.cls].new_of[load.tenant] += load.num
        self._num_new_tokens += load.num_tokens
        self._new_tokens[load.tenant] += load.num_tokens

    def full(self, load: CallLoad, num_queued: int) -> Overloaded:
        """Record that the queue refused a load because `num_queued` requests of its class wait; return the error."""
        queue = self._queues[load.cls]
        queue.counted_ms, queue.num_counted = self._now_ms(), num_queued - queue.num_new
        return self._full(load, num_queued)

    # ------------------------------------------------------------ checks

    def check(self, load: CallLoad | None = None) -> None:
        """Raise Overloaded if there is no room for a call.

        Called three times, each earlier check being cheaper: on arrival, before anything is read (no `load`); before
        any work (`num_tokens` is 0); and before submission. Raises BadRequest for a load that the queue never accepts,
        and QueueFull while its memory is nearly used up.
        """
        if load is None:
            self._check_gateway()
            return
        max_queued = self._settings.max_queued
        if load.num > max_queued:
            text = f"the call makes {load.num} choices; the queue takes {max_queued}"
            raise BadRequest(text, param="n", code="limit_exceeded")
        status = self._status()
        if status is None:
            return
        cost = COST.get()
        if cost is not None and cost.is_inbound:
            self._count_inbound(cost, None)  # it does not wait for itself
        self._take(status)
        _check_memory(status)
        if load.num_tokens:
            self._check_tokens(load, status)
        else:
            self._check_place(load, status)
        self._check_share(load, status)
        self._check_wait(load, status)
        if cost is not None and cost.is_inbound:
            self._count_inbound(cost, load)

    def _check_gateway(self) -> None:
        """Refuse a call on arrival if the gateway itself is overloaded."""
        num, max_open, limits = self._num_in_flight, self._settings.max_open_calls, self._limits
        if num >= max_open:
            text = f"this gateway is answering {num} calls; the limit is {max_open}"
            raise Overloaded(text, self._drain_s(ROOM * max_open))
        lag_s = self._lag_s()
        if lag_s >= limits.max_lag_s:
            text = (
                f"this gateway is {lag_s:.1f} s behind its event loop's schedule; the limit is {limits.max_lag_s:g} s"
            )
            raise Overloaded(text, max(MIN_RETRY_S, lag_s))
        wait_s = self._inbound.wait_s(self._now_s())
        if wait_s >= limits.max_inbound_s:
            text = f"{self._inbound.num} calls are waiting to be queued, for about {wait_s:.0f} s"
            raise Overloaded(f"{text}; the limit is {limits.max_inbound_s:g} s", wait_s)

    def _check_place(self, load: CallLoad, status: m.SchedulerStatus) -> None:
        """Refuse a call if its class's queue is predicted to be full."""
        queue, max_queued = self._queues[load.cls], self._settings.max_queued
        if queue.num_counted + queue.num_new >= NEARLY_FULL * max_queued:
            expected = self._expected(queue, status) + queue.num_inbound
            if expected > max_queued - 1:
                raise self._full(load, math.ceil(expected))

    def _check_tokens(self, load: CallLoad, status: m.SchedulerStatus) -> None:
        """Refuse a call if too many tokens would wait. A call is accepted whatever its size if none wait."""
        queued_tokens, max_tokens = status.queued_tokens + self._num_new_tokens, self._settings.max_queued_tokens
        if not queued_tokens:
            return
        if queued_tokens + load.num_tokens > max_tokens:
            excess = queued_tokens + load.num_tokens - (1 - ROOM) * max_tokens
            text = f"requests of {queued_tokens} tokens are waiting; the limit is {max_tokens}"
            raise Overloaded(text, self._drain_tokens_s(excess, queued_tokens, status), "queued_tokens")
        told = status.tenants.get(load.tenant, _NOTHING)
        own = min(queued_tokens, told.tokens + self._new_tokens[load.tenant])
        free = max_tokens - queued_tokens - load.num_tokens
        if queued_tokens >= INBOUND_FROM * max_tokens:
            own += self._inbound_tokens[load.tenant]
            free -= self._num_inbound_tokens
        most = SHARE * max(0, free)
        if load.tenant and own and own + load.num_tokens > most:
            text = f"{own} of {queued_tokens} waiting tokens are {_OWN} {most}"
            retry_s = self._drain_tokens_s(own + load.num_tokens - most, queued_tokens, status)
            raise Overloaded(text, retry_s, "queued_tokens")

    def _check_share(self, load: CallLoad, status: m.SchedulerStatus) -> None:
        """Refuse a call if its tenant has more requests waiting than its share of the queue."""
        if not load.tenant:
            return
        queue = self._queues[load.cls]
        expected = self._expected(queue, status)
        own, num = self._own(load, status, expected), math.ceil(expected)
        if num >= INBOUND_FROM * self._settings.max_queued:
            own += queue.inbound_of[load.tenant]
            num += queue.num_inbound_requests
        most = SHARE * max(0, self._settings.max_queued - num - load.num + 1)
        if own and own + load.num > most:
            text = f"{own} of {num} waiting requests are {_OWN} {most}"
            raise Overloaded(text, self._drain_s(own + load.num - most), "queue")

    def _own(self, load: CallLoad, status: m.SchedulerStatus, expected: float) -> int:
        """Return how many requests of a load's tenant and class wait. expected: of all tenants."""
        return math.floor(min(expected, self._num_waiting(load.cls, load.tenant, status)))

    def _num_waiting(self, cls: str, tenant: str, status: m.SchedulerStatus) -> int:
        """Return the requests of a tenant and class that wait by the status, and those submitted here since."""
        told = status.tenants.get(tenant, _NOTHING)
        num = told.queued_batch if cls == BATCH else told.queued - told.queued_batch
        return num + self._queues[cls].new_of[tenant]

    def _check_wait(self, load: CallLoad, status: m.SchedulerStatus) -> None:
        """Refuse a call if its first token is predicted to come too late."""
        max_wait_s = min(self._settings.max_wait_s or load.timeout_s, load.timeout_s)
        if self._wait_s(load, status) <= max_wait_s:
            return
        wait_s = self._wait_s(load, status, self._num_behind(load, status))
        if wait_s > max_wait_s:
            text = f"the first token would come in about {wait_s:.0f} s; the limit is {max_wait_s:g} s"
            raise Overloaded(text, max(MIN_RETRY_S, wait_s - (1 - ROOM) * max_wait_s), "wait")

    def _num_behind(self, load: CallLoad, status: m.SchedulerStatus) -> int:
        """Return about how many waiting requests of other tenants a call overtakes, since tenants take turns.

        An unknown tenant is assumed to have none waiting: the check before submission knows it.
        """
        queue = self._queues[load.cls]
        tenants = set(status.tenants)
        if len(queue.new_of) <= MAX_NEW_TENANTS:
            tenants |= queue.new_of.keys()
        if not load.tenant and len(tenants) < 2:
            return 0  # it may be the one
        own = self._own(load, status, self._expected(queue, status)) if load.tenant else 0
        others = (self._num_waiting(load.cls, tenant, status) for tenant in tenants if tenant != load.tenant)
        return sum(max(0, num - own - 1) for num in others)

    def _wait_s(self, load: CallLoad, status: m.SchedulerStatus, num_behind: int = 0) -> float:
        """Return the predicted seconds to a call's first token: until it is queued, and until those ahead have left.

        num_behind: waiting requests that it overtakes. The queue drains while calls are inbound, so it is the longer of
        the two. Unknown parts count as 0.
        """
        inbound_s = 0.0 if load.num_tokens else self._inbound.wait_s(self._now_s())
        if not status.drain_rate:
            return inbound_s
        ahead = [self._queues[INTERACTIVE]] if load.cls == INTERACTIVE else list(self._queues.values())
        num_ahead = sum(self._expected(queue, status) for queue in ahead)
        if not load.num_tokens:
            num_ahead += sum(queue.num_inbound for queue in ahead)
        return max(inbound_s, max(0.0, num_ahead - num_behind) / status.drain_rate)

    # ------------------------------------------------------------ parts

    def _count_inbound(self, cost: RequestCost, load: CallLoad | None) -> None:
        """Count an inbound call with a load, in place of the one that it was counted with; None: not at all."""
        for change, counted in ((-1, cost.load), (1, load)):
            if counted is not None:
                queue = self._queues[counted.cls]
                queue.num_inbound += change
                queue.num_inbound_requests += change * counted.num
                _add(queue.inbound_of, counted.tenant, change * counted.num)
                self._num_inbound_tokens += change * counted.num_tokens
                _add(self._inbound_tokens, counted.tenant, change * counted.num_tokens)
        cost.load = load

    def _now_ms(self) -> int:
        return int(self._now_s() * 1000)

    def _take(self, status: m.SchedulerStatus) -> None:
        """Adopt the counts of the scheduler's status if they are the latest."""
        self._forget(status.sent_ms)
        queued = {BATCH: status.queued_batch, INTERACTIVE: status.queued - status.queued_batch}
        for cls, queue in self._queues.items():
            if status.sent_ms >= queue.counted_ms:
                queue.counted_ms, queue.num_counted = status.sent_ms, queued[cls]

    def _forget(self, before_ms: int) -> None:
        """Move submissions before `before_ms` from `num_new` to the counts, which include them."""
        while self._new and self._new[0][0] < before_ms:
            _, load = self._new.popleft()
            queue = self._queues[load.cls]
            queue.num_new -= load.num
            queue.num_counted += load.num
            _add(queue.new_of, load.tenant, -load.num)
            self._num_new_tokens -= load.num_tokens
            _add(self._new_tokens, load.tenant, -load.num_tokens)

    def _expected(self, queue: _Queue, status: m.SchedulerStatus) -> float:
        """Return how many requests of a class wait now, if the queue has drained at its rate since the last count."""
        drained = status.drain_rate * max(0, self._now_ms() - queue.counted_ms) / 1000
        return max(0.0, queue.num_counted + queue.num_new - drained)

    def _drain_s(self, num: float) -> float:
        """Return the seconds until `num` requests have left the queue, as Retry-After."""
        status = self._status()
        return max(MIN_RETRY_S, num / status.drain_rate) if status and status.drain_rate else UNKNOWN_RETRY_S

    def _drain_tokens_s(self, excess: float, queued_tokens: int, status: m.SchedulerStatus) -> float:
        """Return the seconds until `excess` of the waiting tokens have left the queue, as Retry-After."""
        num_queued = status.queued + sum(queue.num_new for queue in self._queues.values())
        return self._drain_s(excess / queued_tokens * num_queued)

    def _full(self, load: CallLoad, num_queued: int) -> Overloaded:
        max_queued = self._settings.max_queued
        text = f"{num_queued} requests are waiting; the limit is {max_queued}"
        return Overloaded(text, self._drain_s(num_queued + load.num - (1 - ROOM) * max_queued), "queue")


def _add(counter: Counter[str], key: str, num: int) -> None:
    counter[key] += num
    if not counter[key]:
        del counter[key]


def _check_memory(status: m.SchedulerStatus) -> None:
    """Refuse a call while the queue's free memory is reserved for running requests. Raises QueueFull."""
    most = int(MAX_MEMORY_SHARE * status.max_bytes)
    if status.max_bytes and status.used_bytes >= most:
        raise QueueFull(f"the queue holds {status.used_bytes} bytes; new calls are accepted below {most}")
