"""Orders the jobs of a process pool, and limits how many may wait. Pure: times are arguments.

Tenants are served round-robin, first those without CPU debt. No tenant gets all processes, so that another's first job
finds one. Waiting jobs are bounded in number and bytes, per tenant and in total; a tenant's jobs are bounded in CPU
seconds.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from protocol.wire.errors import BadRequest, Overloaded, Unavailable

MAX_WAITING = 8192
MAX_TENANT_WAITING = 2048
MAX_WAITING_BYTES = 128 << 20
MAX_TENANT_BYTES = 32 << 20
"""Also the maximum of a single job."""

MAX_DEBT_S = 30.0
DEBT_RATE = 0.5
"""CPU seconds per second that a tenant may use in the long run; `MAX_DEBT_S` more are allowed in a burst."""

RETRY_S = 2.0
MIN_FORGET = 1024
"""Number of tenants at which those without jobs and debt are removed."""


@dataclass(eq=False, slots=True)
class SandboxTurn:
    """A queued job's tenant and size."""

    tenant: str
    num_bytes: int


T = TypeVar("T", bound=SandboxTurn)


@dataclass(slots=True)
class _Tenant(Generic[T]):
    waiting: OrderedDict[T, None] = field(default_factory=OrderedDict)
    num_bytes: int = 0  # of waiting jobs
    num_running: int = 0
    settled_s: float = -math.inf  # when its debt is paid off

    def debt_s(self, now_s: float) -> float:
        """Return the CPU seconds used beyond its rate."""
        return max(0.0, self.settled_s - now_s) * DEBT_RATE


class Turns(Generic[T]):
    """The jobs that wait for one of `num_processes` processes."""

    def __init__(self, num_processes: int) -> None:
        self._most_running = max(1, num_processes - 1)
        self._tenants: dict[str, _Tenant[T]] = {}
        self._rings: tuple[OrderedDict[str, None], ...] = (OrderedDict(), OrderedDict())
        """Tenants with waiting jobs, next first: those without debt, then the others."""
        self._num_waiting = 0
        self._num_bytes = 0
        self._forget_at = MIN_FORGET

    def __contains__(self, turn: T) -> bool:
        """Return whether a job is waiting."""
        tenant = self._tenants.get(turn.tenant)
        return tenant is not None and turn in tenant.waiting

    def add(self, turn: T, now_s: float) -> None:
        """Queue a job. Raises BadRequest if it is too large, Overloaded or Unavailable if a limit is reached."""
        if turn.num_bytes > MAX_TENANT_BYTES:
            raise BadRequest(f"messages and template have {turn.num_bytes} bytes; the limit is {MAX_TENANT_BYTES}")
        tenant = self._tenants.get(turn.tenant) or _Tenant[T]()
        self._check_tenant(tenant, turn, now_s)
        if self._num_waiting >= MAX_WAITING or self._num_bytes + turn.num_bytes > MAX_WAITING_BYTES:
            text = f"{self._num_waiting} templates and grammars of {self._num_bytes} bytes are waiting"
            text = f"{text}; the limit is {MAX_WAITING} of {MAX_WAITING_BYTES} bytes"
            raise Unavailable(text, code="sandbox_full")
        self._forget_settled(now_s)
        self._tenants[turn.tenant] = tenant
        if not tenant.waiting:
            self._rings[tenant.debt_s(now_s) > 0][turn.tenant] = None
        tenant.waiting[turn] = None
        tenant.num_bytes += turn.num_bytes
        self._num_waiting += 1
        self._num_bytes += turn.num_bytes

    def _check_tenant(self, tenant: _Tenant[T], turn: T, now_s: float) -> None:
        debt_s = tenant.debt_s(now_s)
        if debt_s > MAX_DEBT_S:
            text = f"this tenant's templates and grammars took {debt_s:.0f} s beyond {DEBT_RATE:g} s a second"
            raise Overloaded(f"{text}; the limit is {MAX_DEBT_S:g} s", (debt_s - MAX_DEBT_S) / DEBT_RATE + 1)
        num, num_bytes = len(tenant.waiting), tenant.num_bytes
        if num >= MAX_TENANT_WAITING or num_bytes + turn.num_bytes > MAX_TENANT_BYTES:
            text = f"{num} templates and grammars of this tenant, {num_bytes} bytes, are waiting"
            raise Overloaded(f"{text}; the limit is {MAX_TENANT_WAITING} of {MAX_TENANT_BYTES} bytes", RETRY_S)

    def _forget_settled(self, now_s: float) -> None:
        if len(self._tenants) < self._forget_at:
            return
        for name, tenant in list(self._tenants.items()):
            if not tenant.waiting and not tenant.num_running and tenant.settled_s <= now_s:
                del self._tenants[name]
        self._forget_at = max(MIN_FORGET, 2 * len(self._tenants))

    def remove(self, turn: T) -> None:
        """Remove a job if it still waits."""
        if turn in self:
            self._take(self._tenants[turn.tenant], turn)

    def clear(self) -> list[T]:
        """Remove and return all waiting jobs."""
        waiting = [turn for tenant in self._tenants.values() for turn in tenant.waiting]
        for turn in waiting:
            self.remove(turn)
        return waiting

    @property
    def has_ready(self) -> bool:
        """Whether a job could begin if a process were idle."""
        return any(self._tenants[name].num_running < self._most_running for ring in self._rings for name in ring)

    def next(self, now_s: float) -> T | None:
        """Return the next job and count it as running; None if none may begin."""
        for ring in self._rings:
            for name in ring:
                tenant = self._tenants[name]
                if tenant.num_running < self._most_running:
                    turn = next(iter(tenant.waiting))
                    self._take(tenant, turn)
                    tenant.num_running += 1
                    if tenant.waiting:
                        del ring[name]
                        self._rings[tenant.debt_s(now_s) > 0][name] = None
                    return turn
        return None

    def ended(self, turn: T, cost_s: float, now_s: float) -> None:
        """Count a running job as ended, and charge its CPU seconds to its tenant."""
        tenant = self._tenants[turn.tenant]
        tenant.num_running -= 1
        tenant.settled_s = max(tenant.settled_s, now_s) + cost_s / DEBT_RATE

    def _take(self, tenant: _Tenant[T], turn: T) -> None:
        del tenant.waiting[turn]
        tenant.num_bytes -= turn.num_bytes
        self._num_waiting -= 1
        self._num_bytes -= turn.num_bytes
        if not tenant.waiting:
            for ring in self._rings:
                ring.pop(turn.tenant, None)
