"""Who is let in, and what those are told who are not."""

from __future__ import annotations

import msgspec
import pytest

from gateway.overload.admission import Admission, Load
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Overloaded
from protocol.wire.keys import BATCH, INTERACTIVE

NOW_MS = 1_000_000


def status(queued: int, *, rate: float = 10.0, tokens: int = 0, batch: int = 0) -> m.SchedulerStatus:
    return m.SchedulerStatus(
        queued=queued, running=8, workers=1, drain_rate=rate, queued_tokens=tokens, queued_batch=batch, sent_ms=NOW_MS
    )


def load(cls: str = INTERACTIVE, num: int = 1, num_tokens: int = 100, timeout_s: float = 60.0) -> Load:
    return Load(cls, num, num_tokens, timeout_s)


def refusal(admission: Admission, wanted: Load, told: m.SchedulerStatus | None) -> Overloaded | None:
    try:
        admission.check(wanted, told)
    except Overloaded as error:
        return error
    return None


def test_a_wait_that_is_too_long_is_refused_until_enough_of_the_queue_is_gone() -> None:
    admission = Admission(Settings(max_wait_s=20.0))
    assert refusal(admission, load(), status(200)) is None
    refused = refusal(admission, load(), status(300))
    assert refused is not None
    assert refused.message == "the first token would come in about 30 s; the limit is 20 s"
    # Back after that time, with the queue drained at the measured rate meanwhile, it is let in.
    assert refused.retry_after_s == pytest.approx(12.0)
    assert refusal(admission, load(), status(300 - 120)) is None


@pytest.mark.parametrize("cls", [INTERACTIVE, BATCH])
def test_a_full_queue_refuses_before_any_work_is_done(cls: str) -> None:
    admission = Admission(Settings(max_queued=50))
    admission.check_room(cls, None, NOW_MS)
    admission.check_room(cls, status(99, batch=49 if cls == BATCH else 50), NOW_MS)
    full = msgspec.structs.replace(status(100, batch=50), sent_ms=NOW_MS + 1)
    with pytest.raises(Overloaded, match="50 requests are waiting; the limit is 50") as refused:
        admission.check_room(cls, full, NOW_MS + 1)
    assert refused.value.retry_after_s == pytest.approx(1.0)


def num_let_through(admission: Admission, told: m.SchedulerStatus | None, now_ms: int) -> int:
    """Return how many of a thousand calls may try the queue at one moment."""
    for num in range(1000):
        try:
            admission.check_room(INTERACTIVE, told, now_ms)
        except Overloaded:
            return num
    return 1000


def test_between_two_looks_only_as_many_try_a_full_queue_as_have_left_it() -> None:
    admission, told = Admission(Settings(max_queued=100)), status(50, rate=20.0)
    assert num_let_through(admission, told, NOW_MS) == 1000  # below nine tenths nobody is refused for a guess
    admission.note_full(load(), 100, NOW_MS + 100)
    assert num_let_through(admission, told, NOW_MS + 100) == 0
    assert [num_let_through(admission, told, NOW_MS + ms) for ms in (140, 200, 300)] == [0, 2, 2]
    # The scheduler's next word counts those that came before it.
    told = msgspec.structs.replace(told, queued=95, sent_ms=NOW_MS + 250)
    assert num_let_through(admission, told, NOW_MS + 250) == 5 - 2
    assert num_let_through(admission, msgspec.structs.replace(told, queued=20, sent_ms=NOW_MS + 260), NOW_MS) == 1000
    assert num_let_through(admission, None, NOW_MS + 100) == 1000  # without a scheduler the queue alone decides
    admission.check_room(BATCH, told, NOW_MS)  # the classes have queues of their own


def test_what_would_not_begin_before_its_deadline_is_refused_whatever_the_settings() -> None:
    admission = Admission(Settings(max_wait_s=0.0))
    assert refusal(admission, load(timeout_s=60), status(601)) is not None
    assert refusal(admission, load(timeout_s=61), status(601)) is None


def test_tokens_are_limited_and_a_call_alone_is_never_too_large() -> None:
    admission = Admission(Settings(max_queued_tokens=1000))
    assert refusal(admission, load(num_tokens=5000), status(0)) is None
    assert refusal(admission, load(num_tokens=100), status(9, tokens=900)) is None
    refused = refusal(admission, load(num_tokens=101), status(9, tokens=900))
    assert refused is not None
    assert refused.message == "requests of 900 tokens are waiting; the limit is 1000"
    assert refused.retry_after_s == 1.0


def test_what_was_let_in_since_the_status_counts() -> None:
    admission = Admission(Settings(max_queued_tokens=1000, max_wait_s=1.0))
    admission.note(load(num_tokens=900), NOW_MS - 1)  # the status counts it
    assert refusal(admission, load(), status(1, tokens=900)) is None
    admission.note(load(num_tokens=50), NOW_MS + 1)
    assert refusal(admission, load(), status(1, tokens=900)) is not None
    admission = Admission(Settings(max_wait_s=1.0))
    for _ in range(11):
        admission.note(load(num_tokens=1), NOW_MS + 1)
    assert refusal(admission, load(), status(0)) is not None
    assert admission.num_new == 11
    admission.note(load(num_tokens=1), NOW_MS + 6000)
    assert (admission.num_new, admission.num_new_tokens) == (1, 1)


def test_interactive_calls_do_not_wait_for_batch_work() -> None:
    admission = Admission(Settings(max_wait_s=20.0))
    assert refusal(admission, load(INTERACTIVE), status(300, batch=150)) is None
    assert refusal(admission, load(BATCH), status(300, batch=150)) is not None


def test_an_unknown_rate_or_scheduler_refuses_nobody() -> None:
    admission = Admission(Settings(max_wait_s=1.0))
    assert refusal(admission, load(), status(5000, rate=0.0)) is None
    assert refusal(admission, load(), None) is None


def test_a_full_queue_tells_when_there_will_be_room() -> None:
    admission = Admission(Settings(max_queued=100))
    assert admission.full(load(num=2), 100, status(100)).retry_after_s == pytest.approx(1.2)
    assert admission.full(load(), 100, status(100, rate=0.0)).retry_after_s == 5.0
    assert admission.full(load(), 100, None).retry_after_s == 5.0


def test_more_choices_than_the_queue_ever_takes_are_the_client_s_fault() -> None:
    admission = Admission(Settings(max_queued=4))
    assert refusal(admission, load(num=4), status(0)) is None
    for told in (None, status(0)):
        with pytest.raises(BadRequest, match="the call makes 5 choices; the queue takes 4") as refused:
            admission.check(load(num=5), told)
        assert (refused.value.status, refused.value.param, refused.value.retryable) == (400, "n", False)
