"""Deltas may be duplicated, late, overlapping or lost: a reader still gets the log once, in order, with one end."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass, field

import uvloop
from hypothesis import given
from hypothesis import strategies as st

from gateway.calls.replies import MAX_PENDING, Cursor, Subscription, newest_per_request
from protocol.wire import messages as m

RECORD = m.logprob_record_bytes(0)
RID = "r-0"


def ids_of(start: int, stop: int) -> bytes:
    """Return the tokens [start, stop) of the log, in which each token is its index."""
    return array("i", range(start, stop)).tobytes()


def records_of(start: int, stop: int) -> bytes:
    return b"".join(index.to_bytes(RECORD, "little") for index in range(start, stop))


@dataclass
class Reader:
    """Handles deltas like a call: drops, cuts, or reads the log first."""

    log_length: int = 0
    finish: str = ""
    cursor: Cursor = field(default_factory=Cursor)
    ids: bytes = b""
    records: bytes = b""
    ends: list[str] = field(default_factory=list)
    num_log_reads: int = 0

    def log(self) -> m.Delta:
        self.num_log_reads += 1
        start = self.cursor.next
        epoch = max(self.cursor.epoch, 0)
        return m.Delta(
            RID, epoch, start, ids_of(start, self.log_length), records_of(start, self.log_length), finish=self.finish
        )

    def feed(self, delta: m.Delta, *, at_once: bool = False) -> None:
        if at_once and not delta.finish and self.cursor.take_next(delta):
            self.ids += delta.ids
            self.records += delta.logprobs
            return
        if self.cursor.needs_log(delta):
            self.take(self.log())
            if self.cursor.needs_log(delta):
                assert delta.seq0 < 0
                return
        self.take(delta)

    def take(self, delta: m.Delta) -> None:
        if self.cursor.is_stale(delta):
            return
        ids, records = self.cursor.take(delta, RECORD)
        self.ids += ids
        self.records += records
        if delta.finish:
            self.ends.append(delta.finish)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[m.Delta, int]]:
    """Draw a request's true history under several owners, as (delta, length of the log when it was published)."""
    history: list[tuple[m.Delta, int]] = []
    length, epoch = 0, 1
    for _ in range(draw(st.integers(1, 12))):
        if draw(st.integers(0, 4)) == 0:
            epoch += draw(st.integers(1, 3))  # another owner continues at the end of the log
        stop = length + draw(st.integers(0, 4))
        history.append((m.Delta(RID, epoch, length, ids_of(length, stop), records_of(length, stop)), stop))
        length = stop
    stop = length + draw(st.integers(0, 3))
    if draw(st.booleans()):
        history.append((m.Delta(RID, epoch, length, ids_of(length, stop), records_of(length, stop), "stop"), stop))
    else:
        history.append((m.Delta(RID, 1 << 53, -1, finish="cancelled"), length))
    return history


@given(histories(), st.data())
def test_any_disorder_gives_the_log_once(history: list[tuple[m.Delta, int]], data: st.DataObject) -> None:
    reader = Reader()
    end, total = history[-1]
    for i, (delta, length) in enumerate(history):
        is_last = i == len(history) - 1
        reader.log_length = max(length, data.draw(st.integers(length, total), label="log is ahead"))
        reader.finish = end.finish if is_last else ""
        if is_last or data.draw(st.integers(0, 3), label="lost if 0"):
            reader.feed(delta, at_once=data.draw(st.booleans(), label="at once"))
        for _ in range(data.draw(st.integers(0, 2), label="repetitions")):
            again, _ = history[data.draw(st.integers(0, i), label="which again")]
            if not again.finish or is_last:
                reader.feed(again, at_once=data.draw(st.booleans(), label="again at once"))
        assert reader.ids == ids_of(0, reader.cursor.next)
    assert reader.ids == ids_of(0, total)
    assert reader.records == records_of(0, total)
    assert reader.ends == [end.finish]


def test_an_undisturbed_history_never_reads_the_log() -> None:
    reader = Reader()
    for i in range(5):
        reader.feed(m.Delta(RID, 1, i, ids_of(i, i + 1), records_of(i, i + 1), "stop" if i == 4 else ""))
    assert reader.ids == ids_of(0, 5)
    assert reader.num_log_reads == 0


def test_a_replaced_owner_is_not_heard() -> None:
    cursor = Cursor()
    cursor.take(m.Delta(RID, 2, 0, ids_of(0, 2)), 0)
    late = m.Delta(RID, 1, 2, ids_of(2, 3))
    assert cursor.is_stale(late)
    assert not cursor.needs_log(late)
    assert cursor.take(late, 0) == (b"", b"")
    assert cursor.next == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(0, 9)), min_size=1))
def test_the_newest_delta_of_each_request_is_kept(rows: list[tuple[str, int, int]]) -> None:
    deltas = [m.Delta(rid, epoch, seq0) for rid, epoch, seq0 in rows]
    kept = {delta.rid: delta for delta in newest_per_request(deltas)}
    assert kept.keys() == {delta.rid for delta in deltas}
    for delta in deltas:
        assert (kept[delta.rid].epoch, kept[delta.rid].seq0) >= (delta.epoch, delta.seq0)


async def test_a_slow_reader_s_mailbox_stays_bounded_and_keeps_the_end() -> None:
    mail = Subscription([RID], eager=True)
    for i in range(10 * MAX_PENDING):
        mail.push(m.Delta(RID, 1, i, ids_of(i, i + 1)))
    mail.push(m.Delta(RID, 1, 10 * MAX_PENDING, finish="stop"))
    mail.push(m.Delta(RID, 1, 0, ids_of(0, 1)))  # a duplicate after the end
    deltas = await mail.take(1)
    assert len(deltas) <= MAX_PENDING
    reader = Reader(log_length=10 * MAX_PENDING, finish="stop")
    for delta in deltas:
        reader.feed(delta)
    assert reader.ids == ids_of(0, 10 * MAX_PENDING)
    assert reader.ends == ["stop"]
    assert reader.num_log_reads == 1


async def test_a_patient_mailbox_wakes_for_the_end_only() -> None:
    mail = Subscription([RID], eager=False)
    async with asyncio.TaskGroup() as group:
        taken = group.create_task(mail.take(30))
        await asyncio.sleep(0)
        for i in range(5):
            mail.push(m.Delta(RID, 1, i, ids_of(i, i + 1)))
        await asyncio.sleep(0)
        assert not taken.done()
        mail.push(m.Delta(RID, 1, 5, finish="stop"))
        assert len(await taken) == 6


async def test_a_patient_mailbox_wakes_before_it_overflows() -> None:
    mail = Subscription([RID], eager=False)
    async with asyncio.TaskGroup() as group:
        taken = group.create_task(mail.take(30))
        await asyncio.sleep(0)
        for i in range(MAX_PENDING // 2):
            mail.push(m.Delta(RID, 1, i, ids_of(i, i + 1)))
        assert [delta.seq0 for delta in await taken] == list(range(MAX_PENDING // 2))


async def test_a_call_is_not_woken_for_what_is_taken_at_once() -> None:
    """A delta that isn't accepted waits for the call, and so do those after it, in order."""
    mail = Subscription([RID], eager=True)
    at_once: list[int] = []

    def take(delta: m.Delta) -> bool:
        if delta.seq0 == 3:
            return False
        at_once.append(delta.seq0)
        return True

    mail.at_once = take
    mail.push(m.Delta(RID, 1, 0, ids_of(0, 1)))  # no call waits
    assert len(await mail.take(30)) == 1
    async with asyncio.TaskGroup() as group:
        taken = group.create_task(mail.take(30))
        await asyncio.sleep(0)
        until_s = mail._until_s
        for i in range(1, 3):
            mail.push(m.Delta(RID, 1, i, ids_of(i, i + 1)))
        await asyncio.sleep(0)
        assert not taken.done()
        assert mail._until_s > until_s
        for i in range(3, 6):
            mail.push(m.Delta(RID, 1, i, ids_of(i, i + 1)))
        assert [delta.seq0 for delta in await taken] == [3, 4, 5]
    assert at_once == [1, 2]
    mail.close()


async def test_what_fails_at_once_fails_its_call_alone() -> None:
    mail = Subscription([RID], eager=True)
    failure = ValueError("of a writer")

    def take(delta: m.Delta) -> bool:
        raise failure

    mail.at_once = take
    async with asyncio.TaskGroup() as group:
        taken = group.create_task(mail.take(30))
        await asyncio.sleep(0)
        mail.push(m.Delta(RID, 1, 0, ids_of(0, 1)))
        assert await taken == []
    assert mail.failure is failure
    mail.close()


def test_waits_shorter_than_the_services_loop_can_time() -> None:
    """A delta ends a short wait before its timeout; the next wait has a longer one."""

    async def wait() -> list[list[m.Delta]]:
        subscription = Subscription([RID], eager=True)
        taken: list[list[m.Delta]] = []
        for timeout_s in [0.0004, 60] * 20:
            asyncio.get_running_loop().call_soon(subscription.push, m.Delta(RID, 1, 0, ids_of(0, 1)))
            taken.append(await subscription.take(timeout_s))
        subscription.close()
        return taken

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert all(len(deltas) == 1 for deltas in runner.run(wait()))
