"""Reads this gateway's out stream, and delivers every token of a request exactly once.

A delta may arrive twice, overlap delivered tokens, or be missing. The log holds every token that a client may see, so
such deltas are dropped, cut, or replaced by tokens read from the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from protocol.metrics.series import GATEWAY_LOG_READS, GATEWAY_STALE_DELTAS
from protocol.queue.bus import CONNECTION_ERRORS, Bus, decode
from protocol.runtime.guarded import FAILED
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, ProtocolError

logger = logging.getLogger(__name__)

STREAM_TTL_S = 300
STREAM_MAX_AGE_MS = 60_000
KEEP_S = 1.0  # seconds between checks that the stream exists
MAX_ABANDONED = 1024  # requests remembered; others end at their deadline
NUM_LOOKS = 5  # runs of `keep` in which a late submission may still reach the queue
MAX_PENDING = 64  # deltas held per call; a slower client is served from the log


# ---------------------------------------------------------------- order: the pure part


@dataclass(slots=True)
class Cursor:
    """The position up to which one request has been delivered."""

    next: int = 0  # index of the first token not yet delivered
    epoch: int = 0
    ended: bool = False

    def is_stale(self, delta: m.Delta) -> bool:
        """Return whether a delta must be dropped: the request has ended, or its owner was replaced."""
        return self.ended or delta.epoch < self.epoch

    def needs_log(self, delta: m.Delta) -> bool:
        """Return whether tokens before the delta are missing, so that the log must be read first."""
        return not self.is_stale(delta) and (delta.seq0 < 0 or delta.seq0 > self.next)

    def take_next(self, delta: m.Delta) -> bool:
        """Advance over a delta that directly follows and is the current owner's. Return False for any other delta."""
        if delta.seq0 != self.next or delta.epoch != self.epoch or self.ended:
            return False
        self.next += len(delta.ids) // 4
        return True

    def take(self, delta: m.Delta, record_bytes: int) -> tuple[bytes, bytes]:
        """Advance over a delta that leaves no gap; return its new ids (int32) and logprob records."""
        if self.is_stale(delta):
            return b"", b""
        assert 0 <= delta.seq0 <= self.next, "a gap must be filled from the log"
        self.epoch = delta.epoch
        self.ended = delta.finish != ""
        known = self.next - delta.seq0
        self.next = max(self.next, delta.seq0 + len(delta.ids) // 4)
        return delta.ids[known * 4 :], delta.logprobs[known * record_bytes :]


def newest_per_request(deltas: Iterable[m.Delta]) -> list[m.Delta]:
    """Return the newest delta of each request; the tokens of the others are in the log."""
    newest: dict[str, m.Delta] = {}
    for delta in deltas:
        best = newest.get(delta.rid)
        if best is None or _rank(delta) >= _rank(best):
            newest[delta.rid] = delta
    return list(newest.values())


def _rank(delta: m.Delta) -> tuple[int, bool, int]:
    return delta.epoch, delta.finish != "", delta.seq0


# ---------------------------------------------------------------- delivery


def max_pending(num_choices: int) -> int:
    """Return the maximum number of deltas held for a call."""
    return max(MAX_PENDING, 2 * num_choices)


class Subscription:
    """The bounded mailbox of one call, between the stream reader and the call's task."""

    def __init__(self, rids: Sequence[str], *, eager: bool) -> None:
        self.rids = rids
        self.client_gone = False
        self.failure: Exception | None = None
        self.nudged = False
        self.restarted = False  # the queue was restarted since the call last checked
        self._eager = eager  # wake for every delta, not only for ends and a full mailbox
        self._max_pending = max_pending(len(rids))
        self._pending: list[m.Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._until_s = 0.0  # loop time of the end of the current wait
        self._timer: asyncio.Handle | None = None
        self._timer_s = 0.0  # loop time at which the timer fires
        self._timeout_s = 0.0  # timeout of the current wait
        self.at_once: Callable[[m.Delta], bool] | None = None
        """Receives each delta that arrives while the call waits. Returns True if it has handled the delta, so that the
        call need not wake."""

    def push(self, delta: m.Delta) -> None:
        """Add a delta. Over the limit, only the newest of each request is kept."""
        pending = self._pending
        if self.at_once is not None and self._waiter is not None and not pending and not self._waiter.done():
            try:
                if self.at_once(delta):
                    self._until_s = self._waiter.get_loop().time() + self._timeout_s
                    return
            except Exception as error:  # noqa: BLE001  ends this call only: the reader serves all
                self.fail(error)
                return
        pending.append(delta)
        if len(pending) > self._max_pending:
            self._pending = newest_per_request(pending)
        if self._eager or delta.finish or len(pending) * 2 >= self._max_pending:
            self._wake()

    def hang_up(self) -> None:
        """Wake the call because its client has hung up."""
        self.client_gone = True
        self._wake()

    def nudge(self, *, restarted: bool = False) -> None:
        """Make the call read the log, because deltas may be lost. restarted: the end of the log may be lost too."""
        self.nudged = True
        self.restarted = self.restarted or restarted
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the call with an internal error."""
        self.failure = error
        self._wake()

    async def take(self, timeout_s: float) -> list[m.Delta]:
        """Wait for deltas and return all pending ones; [] after `timeout_s`, or if client or call have ended."""
        if not self._ready():
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            self._timeout_s = timeout_s
            self._set_timer(loop, loop.time() + timeout_s)
            try:
                await self._waiter
            finally:
                self._waiter = None
        deltas, self._pending = self._pending, []
        return deltas

    def close(self) -> None:
        """Cancel the timer, and drop the callback for deltas."""
        self.at_once = None
        self._cancel_timer()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop, until_s: float) -> None:
        """End the wait at `until_s`. An earlier timer is kept and reset when it fires, to avoid a new one per token."""
        self._until_s = until_s
        if self._timer is not None and self._timer_s > until_s:
            self._cancel_timer()
        if self._timer is None:
            self._start_timer(loop)

    def _start_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        # uvloop's handle has no time if the call is due within 0.5 ms, so the time is stored here.
        self._timer, self._timer_s = loop.call_at(self._until_s, self._time_over, loop), self._until_s

    def _time_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if loop.time() < self._until_s:
            self._start_timer(loop)
        else:
            self._wake()

    def _ready(self) -> bool:
        return bool(self._pending) or self.client_gone or self.nudged or self.failure is not None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Replies:
    """Reads this gateway's out stream, `Keys.out`, and fills the mailboxes of calls."""

    def __init__(self, bus: Bus, gid: str, beats: Bus) -> None:
        """beats: a connection for `keep`, which must not wait behind calls."""
        self.bus = bus
        self._beats = beats
        self.gid = gid
        self._stream = bus.keys.out(gid)
        # Read from the beginning: a request may be answered before the first read.
        self._last_ids = {self._stream: b"0"}
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._abandoned: dict[str, int] = {}  # request -> number of cancellations that did not find it

    def subscribe(self, rids: Sequence[str], *, eager: bool) -> Subscription:
        """Open a mailbox. Must precede the submission, so that no delta is missed. eager: wake for every delta."""
        subscription = Subscription(rids, eager=eager)
        for rid in rids:
            self._subscriptions.setdefault(rid, []).append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Close a mailbox."""
        subscription.close()
        for rid in subscription.rids:
            listeners = self._subscriptions.get(rid, [])
            if subscription in listeners:
                listeners.remove(subscription)
            if not listeners:
                self._subscriptions.pop(rid, None)

    def fail_all(self, error: LorafleetError) -> None:
        """End every open call with an error."""
        for listeners in list(self._subscriptions.values()):
            for subscription in listeners:
                subscription.fail(error)

    async def cancel(self, rids: Sequence[str]) -> None:
        """Cancel queued and running requests. If the queue does not know them or is unreachable, retry later."""
        try:
            states = await asyncio.gather(*(self.bus.cancel(rid) for rid in rids))
        except CONNECTION_ERRORS:
            self.abandon(rids)
        else:  # on another connection, a submission may arrive after its cancellation
            self.abandon([rid for rid, state in zip(rids, states, strict=True) if not state])

    def abandon(self, rids: Sequence[str]) -> None:
        """Cancel requests whose submission was not confirmed, as soon as the queue can be reached."""
        self._abandoned |= dict.fromkeys(rids[: MAX_ABANDONED - len(self._abandoned)], 0)

    async def read_log(self, rid: str, cursor: Cursor, record_bytes: int, limit: int) -> m.Delta | None:
        """Return the tokens in a request's log after the cursor, see `Bus.read_log`."""
        GATEWAY_LOG_READS.inc()
        return await self.bus.read_log(rid, cursor.next, record_bytes, limit)

    # ------------------------------------------------------------ loops

    async def open(self) -> None:
        """Create the out stream."""
        await self.bus.streams.create(self._stream, STREAM_TTL_S)

    async def read(self) -> None:
        """Wait for entries of the out stream, and deliver their deltas."""
        found = await self.bus.streams.read(self._last_ids, block_ms=2000)
        for _, fields in found.get(self._stream, ()):
            try:
                self._deliver(fields.get(b"b", b""))
            except Exception as error:  # noqa: BLE001  calls without deltas read the log
                FAILED.note("replies", error, "an entry of the out stream")

    async def keep(self) -> None:
        """Recreate a lost stream, make calls read the log after a loss or restart, and cancel abandoned requests."""
        gone = not await self._beats.streams.keep(self._stream, ttl_s=STREAM_TTL_S, max_age_ms=STREAM_MAX_AGE_MS)
        if gone:
            logger.warning("the output stream was lost; calls catch up from the log")
            await self.open()
        restarted = await self._beats.restarted()
        if gone or restarted:
            for listeners in self._subscriptions.values():
                for subscription in listeners:
                    subscription.nudge(restarted=restarted)
        for rid, num_looks in list(self._abandoned.items()):
            if await self._beats.cancel(rid) or num_looks == NUM_LOOKS:
                del self._abandoned[rid]
            else:
                self._abandoned[rid] += 1

    async def close(self) -> None:
        """Deregister this gateway from the queue."""
        await self.bus.members.leave_gateway(self.gid)

    def _deliver(self, raw: bytes) -> None:
        try:
            deltas = decode(raw, list[m.Delta]) if raw else []
        except ProtocolError:
            # The tokens are in the log: calls read it at the next delta, which shows a gap, or when a wait times out.
            logger.exception("dropped an entry of the out stream")
            return
        for delta in deltas:
            listeners = self._subscriptions.get(delta.rid)
            if listeners is None:
                GATEWAY_STALE_DELTAS.inc()
                continue
            for subscription in listeners:
                subscription.push(delta)
