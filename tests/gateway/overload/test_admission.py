"""Admission: which calls are let in, and which errors the others get."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from gateway.overload.admission import Admission
from gateway.overload.call_load import CallLoad
from gateway.overload.cost import COST, RequestCost
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Overloaded, QueueFull
from protocol.wire.keys import BATCH, INTERACTIVE

NOW_MS = 1_000_000


def status(queued: int, *, rate: float = 10.0, tokens: int = 0, batch: int = 0) -> m.SchedulerStatus:
    return m.SchedulerStatus(
        queued=queued, running=8, workers=1, drain_rate=rate, queued_tokens=tokens, queued_batch=batch, sent_ms=NOW_MS
    )


def load(cls: str = INTERACTIVE, num: int = 1, num_tokens: int = 100, timeout_s: float = 60.0) -> CallLoad:
    return CallLoad(cls, num, num_tokens, timeout_s)


class Call:
    """A call in flight, in a context of its own, like a task."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._context = copy_context()
        self.run(COST.set, RequestCost())
        self.run(admission.enter)

    def run(self, do: Callable[..., object], *args: Any, **more: Any) -> None:
        self._context.run(do, *args, **more)

    def reach_queue(self) -> None:
        self.run(self._admission.leave_inbound, reached_queue=True)

    def close(self) -> None:
        self.run(self._admission.leave)


@dataclass
class Gateway:
    """An admission with scripted status, lag and time."""

    settings: dict[str, Any] = field(default_factory=dict)
    told: m.SchedulerStatus | None = None
    lag_s: float = 0.0
    now_ms: int = NOW_MS

    def __post_init__(self) -> None:
        self.admission = Admission(
            Settings(**self.settings), lambda: self.told, lambda: self.lag_s, now_s=lambda: self.now_ms / 1000
        )
        self.calls: list[Call] = []

    def begin(self, load: CallLoad | None = None) -> None:
        """Let a call arrive, and check its load against the queue."""
        call = Call(self.admission)
        try:
            if load is not None:
                call.run(self.admission.check, load)
        except Overloaded:
            call.close()
            raise
        self.calls.append(call)

    def queue_at_100_a_second(self, num: int) -> None:
        """Let so many calls reach the queue."""
        for _ in range(num):
            self.now_ms += 10
            call = self.calls.pop()
            call.reach_queue()
            call.close()  # it counts once

    def refusal(self, wanted: CallLoad | None) -> Overloaded | None:
        try:
            self.admission.check(wanted)
        except Overloaded as error:
            return error
        return None


def gateway(told: m.SchedulerStatus | None = None, **settings: Any) -> Gateway:
    return Gateway(settings, told)


# ---------------------------------------------------------------- the gateway's own limits


def test_calls_in_flight_are_limited() -> None:
    """A refused call is told to retry when a tenth of them is expected to have ended."""
    site = gateway(status(0, rate=5.0), max_open_calls=100)
    for _ in range(99):
        site.begin()
    assert site.refusal(None) is None
    site.begin()
    refused = site.refusal(None)
    assert refused is not None
    assert refused.message == "this gateway is answering 100 calls; the limit is 100"
    assert refused.retry_after_s == pytest.approx(2.0)
    assert site.refusal(load()) is None  # a call that is in flight already
    site.calls.pop().close()
    assert site.refusal(None) is None


def test_no_call_is_let_in_while_the_queue_s_memory_is_nearly_full() -> None:
    site = gateway(status(0))
    assert site.refusal(load()) is None  # a server without a limit
    site.told = msgspec.structs.replace(status(0), used_bytes=899, max_bytes=1000)
    assert site.refusal(load()) is None
    site.told = msgspec.structs.replace(status(0), used_bytes=900, max_bytes=1000)
    for wanted in (CallLoad(INTERACTIVE), load(), load(BATCH)):
        with pytest.raises(QueueFull, match="the queue holds 900 bytes; new calls are accepted below 900") as refused:
            site.admission.check(wanted)
        assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (503, "queue_full", 5.0)


def test_the_lag_of_the_loop_is_limited() -> None:
    site = gateway()
    for lag_s in (0.0, 1.9):
        site.lag_s = lag_s
        assert site.refusal(None) is None
    site.lag_s = 3.0
    refused = site.refusal(None)
    assert refused is not None
    assert refused.message == "this gateway is 3.0 s behind its event loop's schedule; the limit is 2 s"
    assert refused.retry_after_s == pytest.approx(3.0)
    assert site.refusal(load()) is None  # calls that were let in continue


def test_the_way_to_the_queue_is_limited() -> None:
    site = gateway()
    for _ in range(1000):
        site.begin()
    site.queue_at_100_a_second(200)
    refused = site.refusal(None)
    assert refused is not None
    assert refused.message == "800 calls are waiting to be queued, for about 8 s; the limit is 5 s"
    assert refused.retry_after_s == pytest.approx(8.0, rel=0.02)
    while len(site.calls) > 450:
        site.calls.pop().close()
    assert site.refusal(None) is None


# ---------------------------------------------------------------- a full queue


@pytest.mark.parametrize("cls", [INTERACTIVE, BATCH])
def test_a_full_queue_refuses_before_any_work_is_done(cls: str) -> None:
    site = gateway(max_queued=50)
    site.admission.check(CallLoad(cls))
    site.told = status(99, batch=49 if cls == BATCH else 50)
    site.admission.check(CallLoad(cls))
    site.now_ms += 1
    site.told = msgspec.structs.replace(status(100, batch=50), sent_ms=site.now_ms)
    with pytest.raises(Overloaded, match="50 requests are waiting; the limit is 50") as refused:
        site.admission.check(CallLoad(cls))
    assert refused.value.retry_after_s == pytest.approx(1.0)


def num_let_through(site: Gateway, at_ms: int) -> int:
    """Return how many of a thousand simultaneous calls may try the queue."""
    site.now_ms = at_ms
    for num in range(1000):
        try:
            site.begin(CallLoad(INTERACTIVE))
        except Overloaded:
            return num
    return 1000


def submit(site: Gateway) -> None:
    """Submit all inbound calls."""
    while site.calls:
        call = site.calls.pop()
        call.reach_queue()
        call.run(site.admission.submitted, load())
        call.close()


def test_between_two_counts_only_as_many_try_a_full_queue_as_left_it() -> None:
    site = gateway(status(50, rate=20.0), max_queued=100)
    assert num_let_through(site, NOW_MS) == 1000  # below nine tenths, no call is refused based on an estimate
    while site.calls:
        site.calls.pop().close()
    site.now_ms = NOW_MS + 100
    site.admission.full(load(), 100)
    assert num_let_through(site, NOW_MS + 100) == 0
    passed = []
    for ms in (140, 200, 300):
        passed.append(num_let_through(site, NOW_MS + ms))
        submit(site)
    assert passed == [0, 2, 2]
    # The scheduler's next status includes the calls submitted before it.
    assert site.told is not None
    site.told = msgspec.structs.replace(site.told, queued=95, sent_ms=NOW_MS + 250)
    assert num_let_through(site, NOW_MS + 250) == 5 - 2
    site.told = msgspec.structs.replace(site.told, queued=20, sent_ms=NOW_MS + 260)
    assert num_let_through(site, NOW_MS) == 1000
    site.told = msgspec.structs.replace(site.told, queued=100, sent_ms=NOW_MS + 270)
    site.admission.check(CallLoad(BATCH))  # each class has a queue of its own
    site.told = None
    assert num_let_through(site, NOW_MS + 100) == 1000  # without a scheduler, only the queue decides


def test_inbound_calls_count_until_they_end_or_wait_for_something_else() -> None:
    site = gateway(status(95, rate=0.0), max_queued=100)
    assert num_let_through(site, NOW_MS) == 5
    site.calls[0].run(site.admission.leave_inbound)  # as if it waited for a store
    assert num_let_through(site, NOW_MS) == 1
    site.calls.pop(0).close()
    assert num_let_through(site, NOW_MS) == 0
    site.calls.pop().close()
    assert num_let_through(site, NOW_MS) == 1


def test_a_full_queue_tells_when_there_will_be_room() -> None:
    site = gateway(status(100), max_queued=100)
    assert site.admission.full(load(num=2), 100).retry_after_s == pytest.approx(1.2)
    site.told = status(100, rate=0.0)
    assert site.admission.full(load(), 100).retry_after_s == 5.0
    site.told = None
    assert site.admission.full(load(), 100).retry_after_s == 5.0


def test_more_choices_than_the_queue_ever_takes_are_the_client_s_fault() -> None:
    site = gateway(status(0), max_queued=4)
    assert site.refusal(load(num=4)) is None
    for told in (None, status(0)):
        site.told = told
        with pytest.raises(BadRequest, match="the call makes 5 choices; the queue takes 4") as refused:
            site.admission.check(load(num=5))
        assert (refused.value.status, refused.value.param, refused.value.retryable) == (400, "n", False)


def test_tokens_are_limited_and_a_call_alone_is_never_too_large() -> None:
    site = gateway(status(0), max_queued_tokens=1000)
    assert site.refusal(load(num_tokens=5000)) is None
    site.told = status(9, tokens=900)
    assert site.refusal(load(num_tokens=100)) is None
    refused = site.refusal(load(num_tokens=101))
    assert refused is not None
    assert refused.message == "requests of 900 tokens are waiting; the limit is 1000"
    assert refused.retry_after_s == 1.0


# ---------------------------------------------------------------- the predicted wait


@pytest.mark.parametrize("num_tokens", [0, 100])
def test_too_long_a_wait_is_refused_until_enough_of_the_queue_is_gone(num_tokens: int) -> None:
    site = gateway(status(200), max_wait_s=20.0)
    assert site.refusal(load(num_tokens=num_tokens)) is None
    site.told = status(300)
    refused = site.refusal(load(num_tokens=num_tokens))
    assert refused is not None
    assert refused.message == "the first token would come in about 30 s; the limit is 20 s"
    # A client that retries after that time is let in, if the queue drains at the measured rate in the meantime.
    assert refused.retry_after_s == pytest.approx(12.0)
    site.told = status(300 - 120)
    assert site.refusal(load(num_tokens=num_tokens)) is None


def test_what_would_begin_after_its_deadline_is_always_refused() -> None:
    site = gateway(status(601), max_wait_s=0.0)
    assert site.refusal(load(timeout_s=60)) is not None
    assert site.refusal(load(timeout_s=61)) is None
    assert site.refusal(CallLoad(INTERACTIVE)) is None  # its deadline is not known yet


def test_what_was_submitted_since_the_status_counts() -> None:
    site = gateway(status(1, tokens=900), max_queued_tokens=1000, max_wait_s=1.0)
    site.now_ms = NOW_MS - 1
    site.admission.submitted(load(num_tokens=900))  # included in the status
    assert site.refusal(load()) is None
    site.now_ms = NOW_MS + 1
    site.admission.submitted(load(num_tokens=50))
    assert site.refusal(load()) is not None
    site = gateway(status(0), max_wait_s=1.0)
    for _ in range(11):
        site.admission.submitted(load(num_tokens=1))
    assert site.refusal(load()) is not None


def test_submitted_loads_are_not_remembered_for_long_without_a_status() -> None:
    site = gateway(max_queued_tokens=1000)
    site.admission.submitted(load(num_tokens=900))
    site.now_ms = NOW_MS + 6000
    site.admission.submitted(load(num_tokens=1))
    site.told = status(0)
    assert site.refusal(load(num_tokens=999)) is None
    assert site.refusal(load(num_tokens=1000)) is not None


def test_the_wait_includes_the_calls_that_are_inbound() -> None:
    """The predicted wait of an inbound call includes the time to the queue; that of a queued call what is ahead."""
    site = gateway(status(190), max_wait_s=20.0)
    for _ in range(10):
        site.begin(CallLoad(INTERACTIVE))
    assert site.refusal(CallLoad(INTERACTIVE)) is None
    site.begin(CallLoad(INTERACTIVE))
    refused = site.refusal(CallLoad(INTERACTIVE))
    assert refused is not None
    assert refused.message == "the first token would come in about 20 s; the limit is 20 s"
    assert site.refusal(load()) is None


def test_the_wait_is_at_least_the_time_to_the_queue() -> None:
    site = gateway(status(10, rate=100.0), max_wait_s=3.0)
    for _ in range(600):
        site.begin()
    site.queue_at_100_a_second(200)
    refused = site.refusal(CallLoad(INTERACTIVE))
    assert refused is not None
    assert refused.message == "the first token would come in about 4 s; the limit is 3 s"
    assert site.refusal(None) is None
    assert site.refusal(load()) is None


def test_interactive_calls_do_not_wait_for_batch_work() -> None:
    site = gateway(status(300, batch=150), max_wait_s=20.0)
    assert site.refusal(load(INTERACTIVE)) is None
    assert site.refusal(load(BATCH)) is not None


def test_an_unknown_rate_or_scheduler_refuses_nobody() -> None:
    site = gateway(status(5000, rate=0.0), max_wait_s=1.0)
    assert site.refusal(load()) is None
    site.told = None
    assert site.refusal(load()) is None


# ---------------------------------------------------------------- shares of tenants


def shared(num: dict[str, int], *, cls: str = INTERACTIVE, tokens: int = 0) -> m.SchedulerStatus:
    """Return a status with so many waiting requests per tenant, all of one class. tokens: of each request."""
    total = sum(num.values())
    loads = {name: m.TenantLoad(n, n if cls == BATCH else 0, n * tokens) for name, n in num.items()}
    told = status(total, tokens=total * tokens, batch=total if cls == BATCH else 0)
    return msgspec.structs.replace(told, tenants=loads)


def of(tenant: str, cls: str = INTERACTIVE, num: int = 1, num_tokens: int = 0) -> CallLoad:
    return CallLoad(cls, num, num_tokens, 600.0, tenant)


@pytest.mark.parametrize("cls", [INTERACTIVE, BATCH])
def test_no_tenant_fills_a_queue(cls: str) -> None:
    """A tenant may have eight times as much waiting as is free; alone, 800 of 900 places."""
    site = gateway(shared({"flood": 799}, cls=cls), max_queued=900)
    assert site.refusal(of("flood", cls)) is None
    site.told = shared({"flood": 801}, cls=cls)
    refused = site.refusal(of("flood", cls))
    assert refused is not None
    assert (refused.reason, refused.retry_after_s) == ("queue", pytest.approx(1.0))
    assert refused.message == (
        "801 of 801 waiting requests are of the same tenant (without keys: of the same model); its limit is now 792"
    )
    assert site.refusal(of("other", cls)) is None
    assert site.refusal(of("other", cls, num=99, num_tokens=1)) is None  # all that is free
    other_class = INTERACTIVE if cls == BATCH else BATCH
    assert site.refusal(of("flood", other_class)) is None  # each class has a queue of its own


def test_many_choices_count_as_many_requests() -> None:
    site = gateway(shared({"flood": 700}), max_queued=900)
    assert site.refusal(of("flood", num=100, num_tokens=1)) is None
    site.told = shared({"flood": 780})
    assert site.refusal(of("flood", num=181, num_tokens=1)) is not None


def test_what_a_tenant_has_submitted_since_the_status_counts() -> None:
    """Only as far as it still waits: a fast fleet may have answered it since."""
    site = gateway(msgspec.structs.replace(shared({"other": 10}), drain_rate=0.0), max_queued=90)
    site.now_ms += 1
    for _ in range(72):
        site.admission.submitted(of("flood", num_tokens=1))
    assert site.refusal(of("flood")) is not None
    assert site.refusal(of("other")) is None
    site.told = msgspec.structs.replace(shared({"other": 10}), drain_rate=1000.0)
    site.now_ms += 80
    assert site.refusal(of("flood")) is None


def test_a_tenant_s_submissions_are_forgotten_with_the_next_status() -> None:
    site = gateway(shared({}), max_queued=90, max_queued_tokens=900)
    for _ in range(1000):
        site.admission.submitted(of("flood", num_tokens=1))
    site.now_ms += 1000
    site.told = msgspec.structs.replace(shared({"flood": 5}, tokens=1), sent_ms=site.now_ms)
    assert site.refusal(of("flood")) is None
    assert site.refusal(of("flood", num_tokens=1)) is None


def test_no_tenant_s_tokens_fill_a_queue() -> None:
    site = gateway(shared({"flood": 7}, tokens=100), max_queued_tokens=1000)
    assert site.refusal(of("flood", num_tokens=100)) is None
    site.told = shared({"flood": 9}, tokens=100)
    refused = site.refusal(of("flood", num_tokens=10))
    assert refused is not None
    assert refused.reason == "queued_tokens"
    assert refused.message == (
        "900 of 900 waiting tokens are of the same tenant (without keys: of the same model); its limit is now 720"
    )
    assert site.refusal(of("other", num_tokens=100)) is None


def test_a_tenant_waits_only_for_its_turns() -> None:
    """A thousand requests of another tenant are ahead of one's first only as one."""
    site = gateway(shared({"flood": 1000}), max_wait_s=20.0)
    assert site.refusal(of("")) is not None, "it may be the tenant that waits"
    site.told = shared({"flood": 1000, "small": 3})
    assert site.refusal(of("")) is None, "the check before its submission knows whose it is"
    assert site.refusal(of("flood")) is not None
    assert site.refusal(of("other")) is None
    assert site.refusal(of("small")) is None
    site.told = shared({"flood": 1000, "other": 300})
    refused = site.refusal(of("other"))  # its own 300, and 301 of the other's
    assert refused is not None
    assert refused.message == "the first token would come in about 60 s; the limit is 20 s"


def test_a_tenant_does_not_wait_for_what_others_have_just_submitted() -> None:
    site = gateway(msgspec.structs.replace(shared({"small": 1}), drain_rate=1.0), max_wait_s=20.0)
    site.now_ms += 1
    for _ in range(700):
        site.admission.submitted(of("flood", num_tokens=1))
    assert site.refusal(of("flood")) is not None
    assert site.refusal(of("other")) is None


@pytest.mark.parametrize("num_tokens", [0, 10])
def test_calls_that_are_not_queued_yet_count_in_their_tenant_s_share(num_tokens: int) -> None:
    """A thousand calls at once pass the check before any is submitted."""
    site = gateway(shared({"flood": 450}, tokens=10), max_queued=900, max_queued_tokens=9000)
    with suppress(Overloaded):
        for _ in range(1000):
            site.begin(of("flood", num_tokens=num_tokens))
    assert len(site.calls) == 350
    for _ in range(80):
        site.begin(of("other", num_tokens=num_tokens))
    for call in site.calls:
        call.close()
    assert site.refusal(of("flood", num_tokens=num_tokens)) is None


def test_a_call_counts_once_however_often_it_is_checked() -> None:
    site = gateway(shared({"flood": 6}), max_queued=12)
    site.begin(of("flood"))
    for _ in range(3):
        site.calls[0].run(site.admission.check, of("flood", num=4, num_tokens=1))
    with pytest.raises(Overloaded, match=r"10 of 10 waiting requests .*; its limit is now 0"):
        site.begin(of("flood", num=3))
    site.calls[0].reach_queue()
    assert site.refusal(of("flood", num=3)) is None


def test_an_idle_fleet_takes_as_many_calls_at_once_as_come() -> None:
    site = gateway(shared({}), max_queued=64)
    for _ in range(128):
        site.begin(of("only"))


def test_one_large_call_leaves_room_too() -> None:
    site = gateway(shared({"flood": 700}), max_queued=900, max_queued_tokens=1000)
    assert site.refusal(of("flood", num=200, num_tokens=1)) is not None
    assert site.refusal(of("flood", num=99, num_tokens=1)) is None
    site.told = shared({"flood": 5}, tokens=100)
    assert site.refusal(of("flood", num_tokens=500)) is not None
    assert site.refusal(of("flood", num_tokens=380)) is None
