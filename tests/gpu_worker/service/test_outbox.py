"""The queue's reply to a step script concerns the assignment for which the step was built, not a later one."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_worker.service.outbox import Outbox, OutboxRecovery
from gpu_worker.service.owned import OwnedRequest, PendingOutput
from protocol.queue.bus import Refused

FIRST, AGAIN = b"1-0", b"2-0"


def request(entry: bytes, *, epoch: int = 1) -> OwnedRequest:
    return OwnedRequest("r", epoch, entry, "", "t", num_prompt_tokens=5, record_bytes=0)


def ids(num: int) -> bytes:
    return np.arange(num, dtype="<i4").tobytes()


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("code", ["stale", "terminal", "missing", "cancelled", "length"])
def test_a_refusal_says_nothing_of_a_later_assignment(code: str, epoch: int) -> None:
    """A queue that lost its last second may give an epoch twice, so the epoch does not distinguish assignments."""
    outbox, pending = Outbox("w"), {"r": PendingOutput(0, ids(2), finish="stop")}
    outbox.take(FIRST, [request(FIRST)])
    assert outbox.build(pending).rows
    assert outbox.take(AGAIN, [request(AGAIN, epoch=epoch)]) == ["r"]
    recovery = outbox.recover(pending, [Refused("r", code, epoch, 1)])  # type: ignore[arg-type]
    assert recovery == OutboxRecovery()
    assert outbox.owned == {"r": request(AGAIN, epoch=epoch)}
    assert outbox.knows(AGAIN)
    assert outbox.released == [FIRST]


def test_what_became_durable_is_not_added_to_a_later_assignment() -> None:
    """The later assignment read its log from the queue, which may already contain this output; and it has not ended."""
    outbox, pending = Outbox("w"), {"r": PendingOutput(0, ids(2), finish="stop")}
    outbox.take(FIRST, [request(FIRST)])
    step = outbox.build(pending)
    outbox.take(AGAIN, [request(AGAIN)])
    outbox.commit(step, pending)
    assert outbox.owned == {"r": request(AGAIN)}
    assert outbox.knows(AGAIN)
    assert not outbox.knows(FIRST)


def test_a_refusal_of_the_present_assignment_ends_it() -> None:
    outbox, pending = Outbox("w"), {"r": PendingOutput(0, ids(2))}
    outbox.take(FIRST, [request(FIRST)])
    outbox.build(pending)
    assert outbox.recover(pending, [Refused("r", "stale", 2, 0)]).dropped == ["r"]
    assert not outbox.owned
    assert not pending
    assert outbox.released == [FIRST]


def test_an_emptied_entry_that_is_taken_again_is_not_deleted() -> None:
    outbox = Outbox("w")
    outbox.take(FIRST, [request(FIRST)])
    outbox.drop("r")
    assert outbox.take(FIRST, []) == []
    assert outbox.released == [FIRST]
    assert not outbox.knows(FIRST)
    outbox.take(FIRST, [request(FIRST)])
    assert outbox.released == []
    step = outbox.build({"r": PendingOutput(0, ids(2), finish="stop")})
    assert step.done_entries == [FIRST]
