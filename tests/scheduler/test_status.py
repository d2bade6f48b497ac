"""The scheduler's status, by which gateways admit calls."""

from __future__ import annotations

from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from protocol.wire import messages as m
from scheduler.backlog import TenantQueued
from scheduler.session import _tenants
from tests.scheduler.fakes import make_submit, running_scheduler, submit


async def test_the_status_names_the_tenants_whose_requests_wait(bus: Bus) -> None:
    async def told() -> dict[str, m.TenantLoad]:
        status = await bus.get(bus.keys.status, m.SchedulerStatus)
        return status.tenants if status is not None else {}

    async def is_told(expected: dict[str, m.TenantLoad]) -> bool:
        return await told() == expected

    async with running_scheduler(bus):
        await submit(bus, make_submit("r0", tenant="a"), make_submit("r1", tenant="b"))
        await submit(bus, make_submit("r2", tenant="b", cls="batch"))
        tokens = (sub := make_submit("r")).num_prefill_tokens + sub.max_new_tokens
        expected = {"a": m.TenantLoad(1, 0, tokens), "b": m.TenantLoad(2, 1, 2 * tokens)}
        await wait_until(lambda: is_told(expected), "both are named")
        await bus.cancel("r1")
        await bus.cancel("r2")
        await wait_until(lambda: is_told({"a": expected["a"]}), "a tenant that waits for nothing is not")


def test_the_status_names_the_tenants_with_most_waiting() -> None:
    """Few large requests fill a queue as well as many small ones do."""
    queued = {f"t{i}": TenantQueued(num=i + 1, num_tokens=1000 - i) for i in range(200)}
    assert _tenants(queued).keys() == {f"t{i}" for i in (*range(64), *range(136, 200))}
