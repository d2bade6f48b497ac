"""*Follow*, the seventh stage: collect a call's deltas in order, and cancel requests that no client waits for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from gateway.calls import observe
from gateway.calls.choices import Choice, Piece, tokens_of
from gateway.calls.replies import Replies
from gateway.calls.submit import SubmittedCall
from gateway.calls.trace import TRACE_OF
from gateway.calls.waiting import waiting_state
from gateway.calls.writers import CallUsage
from protocol.queue.bus import CONNECTION_ERRORS, RequestFacts, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import DeadlineExceeded, LorafleetError, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

Pieces = dict[tuple[str, int], Piece]
"""Pieces by request and, if pieces are limited to few tokens, by the number of the piece."""

DEADLINE_SLACK_MS = 5000
"""Maximum milliseconds after its deadline that a call waits for the scheduler to end it, in case no scheduler runs."""

RECONNECT_S = 0.2

TEXT_TOKENS, MATCHED_TOKENS, REGEX_TOKENS = 1024, 128, 32
"""Tokens read from a log at a time, without logprobs: one or two milliseconds of work, after which other tasks run.
MATCHED_TOKENS: with stop strings, whose search takes one or two µs per character. REGEX_TOKENS: with expressions, which
take up to 40 µs per character."""


class ClientGoneError(Exception):
    """The client has hung up, so there is no one to answer."""


class Generation:
    """The choices of a running call. Call `advance` until `is_done`, then always `close`."""

    def __init__(self, replies: Replies, call: SubmittedCall) -> None:
        """call: a submitted call with a mailbox."""
        assert call.mail is not None
        self.call = call
        self.choices = choices_of(call)
        self._replies = replies
        self._mail = call.mail
        self._by_rid = {choice.rid: choice for choice in self.choices}
        self._open = {choice.rid for choice in self.choices}
        self._has_token = False
        self._started_s = call.submitted_s or time.monotonic()  # an earlier call is timed from now on
        self._tenant = call.parsed.caller.owner
        self._trace = TRACE_OF.get()
        self._trace_id = self._trace.place.hex if self._trace is not None else ""
        self._finishes: list[str] = []
        self._first_ns = 0  # unix ns of the first token, if the call is traced
        self._timings: dict[str, m.Timing] = {}  # latest timing of each request
        self._failure: LorafleetError | None = None  # error that ended the call, raised after its pieces
        self._kind = observe.kind_of("".join(target.digest for target in call.targets))

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    @property
    def client_gone(self) -> bool:
        """Whether the client has hung up."""
        return self._mail.client_gone

    @property
    def usage(self) -> CallUsage:
        """Token counts of the call so far."""
        return usage_of(self.choices)

    async def facts(self) -> RequestFacts | None:
        """Return the queue's facts about the first request; None if it is unknown, or the queue cannot be reached."""
        try:
            return (await self._replies.bus.requests([self.choices[0].rid]))[0]
        except CONNECTION_ERRORS as error:
            logger.warning("the timings of a call cannot be read: %s", error)
            return None

    def hang_up(self) -> None:
        """Record that the client has gone, so that `advance` raises ClientGoneError."""
        self._mail.hang_up()

    async def advance(self, timeout_s: float) -> list[Piece]:
        """Wait for output and return it, one piece per choice or per token; [] after `timeout_s` without any.

        A choice with logprobs may have several pieces, each of few tokens. Raises the error that ended a request, and
        ClientGoneError.
        """
        if self.call.parsed.options.is_empty:
            return self._skip_all()
        if self._failure is not None:
            self._open.clear()
            raise self._failure
        poll_s = self.call.poll_s
        deltas = await self._mail.take(min(poll_s, timeout_s) if poll_s else timeout_s)
        if self._mail.client_gone:
            raise ClientGoneError
        if self._mail.failure is not None:
            raise self._mail.failure
        pieces: Pieces = {}
        for delta in deltas:
            choice = self._by_rid[delta.rid]
            if delta.timing is not None and not choice.cursor.is_stale(delta):
                self._note(choice, delta.timing)
            if choice.cursor.needs_log(delta):
                if self._mail.nudged:
                    continue  # the logs are read below
                await self._take(choice, await self._read_log(choice), pieces)
                if choice.cursor.needs_log(delta):
                    # The queue has lost the tokens before this delta; the owner, or the next one, writes them again.
                    continue
            await self._take(choice, delta, pieces)
        if self._mail.restarted:
            self._mail.restarted = False
            await self._mend()
        if not deltas or self._mail.nudged:
            self._mail.nudged = False
            await self._catch_up(pieces)
        if pieces and not self._has_token:
            self._has_token = True
            first = self.choices[next(iter(pieces.values())).index]
            observe.first_token(self._tenant, first.prompt.target, time.monotonic() - self._started_s, self._trace_id)
            if self._trace is not None:
                self._first_ns = time.time_ns()
        return list(pieces.values())

    def pass_on(self, take: Callable[[m.Delta], bool]) -> None:
        """Pass each delta to `take` while `advance` waits; if `take` returns False, `advance` processes the delta."""
        self._mail.at_once = take

    def piece_of(self, delta: m.Delta) -> Piece | None:
        """Return the piece of a delta from `pass_on`, as `Choice.next_piece`; None before the call's first token."""
        return self._by_rid[delta.rid].next_piece(delta) if self._has_token else None

    async def waiting_for(self) -> str:
        """Return a short description of what a call without output waits for; "" after its first token."""
        if self._has_token or not self._open:
            return ""
        first = next(choice.rid for choice in self.choices if choice.rid in self._open)
        try:
            return await waiting_state(self._replies.bus, first)
        except CONNECTION_ERRORS:
            return "the queue cannot be reached"

    async def close(self) -> None:
        """Stop following. Running requests are cancelled, unless an Idempotency-Key may retrieve them later."""
        self._replies.unsubscribe(self._mail)
        num_tokens = sum(choice.num_output_tokens for choice in self.choices)
        if self._trace is not None:
            self._trace.answered(self.call.id, self.usage, self._finishes)
            if self._first_ns:
                self._trace.stage("stream", self._first_ns)
        for choice in self.choices:
            observe.left(self._tenant, choice.prompt.target, choice.num_output_tokens)
        if self.is_done:
            observe.succeeded(self._kind, time.monotonic() - self._started_s, num_tokens, self._trace_id)
        elif not self.call.parsed.key:
            await self._replies.cancel(list(self._open))

    # ------------------------------------------------------------ order

    def _note(self, choice: Choice, timing: m.Timing) -> None:
        """Record an assignment's timing; a worker reports it at most twice, with the first token and with the end."""
        before = self._timings.get(choice.rid)
        self._timings[choice.rid] = timing
        if before is None or before.taken_ms != timing.taken_ms:
            observe.placed(self._tenant, choice.prompt.target, timing)

    def _skip_all(self) -> list[Piece]:
        pieces = [Piece(choice.index) for choice in self.choices]
        for choice, piece in zip(self.choices, pieces, strict=True):
            choice.skip(piece)
        self._open.clear()
        return pieces

    async def _mend(self) -> None:
        """Write open requests and their delivered tokens back into a queue that has lost its last second.

        Only lost requests are submitted again: a queue whose memory is full would not even find that it has them.
        """
        facts = await self._insist(partial(self._replies.bus.requests, list(self._open)))
        if None in facts and self.call.resubmit is not None:
            await self._insist(self.call.resubmit)
        for rid in self._open:
            choice = self._by_rid[rid]
            choice.cursor.epoch = 0  # the restored queue may assign lower epochs
            ids, records = choice.shown
            if ids:
                repair = partial(self._replies.bus.repair, rid, 0, ids, records, choice.record_bytes)
                await self._insist(repair)

    async def _catch_up(self, pieces: Pieces) -> None:
        """Read undelivered tokens from the logs of all open requests. Raises DeadlineExceeded after the deadline."""
        num_tokens = 0
        for rid in list(self._open):
            choice = self._by_rid[rid]
            delta = await self._read_log(choice)
            if delta.ids or delta.finish:
                await self._take(choice, delta, pieces)
            num_tokens += len(delta.ids) // 4
            limit = log_limit(choice)
            if limit and num_tokens >= limit:
                self._mail.nudge()
                break  # the next `advance` reads the other logs
        slack_ms = min(DEADLINE_SLACK_MS, self.call.deadline_ms - self.call.created_ms)
        if self._open and now_ms() > self.call.deadline_ms + slack_ms:
            raise DeadlineExceeded("the request exceeded its deadline")

    async def _take(self, choice: Choice, delta: m.Delta, pieces: Pieces) -> None:
        if choice.cursor.is_stale(delta):
            return
        if choice.needs_prompt and delta.ids:
            found = await self._insist(
                partial(self._replies.bus.prompt_logprobs, choice.rid, choice.options.prompt_record_bytes)
            )
            if found is None:
                raise Unavailable("the queue has lost the logprobs of a prompt", code="request_lost")
            choice.give_prompt(*found)
        by_token = choice.options.by_token
        size = 1 if by_token else log_limit(choice) if choice.record_bytes else 0  # tokens of a piece; 0: any number
        for one in tokens_of(delta, choice.record_bytes) if by_token else [delta]:
            if by_token and one.ids and one.seq0 < choice.cursor.next:
                continue  # delivered before
            place = (choice.rid, choice.cursor.next // size if size else 0)
            piece = pieces.setdefault(place, Piece(choice.index))
            try:
                choice.take(one, piece)
            except LorafleetError as error:
                observe.choice_ended(one.finish)
                if by_token and len(pieces) > 1:
                    del pieces[place]
                    self._failure = error  # raised after the tokens before it
                    return
                self._open.discard(choice.rid)
                raise
            if piece.finish and choice.rid in self._open:
                self._open.discard(choice.rid)
                self._finishes.append(piece.finish)
                observe.choice_ended(piece.finish)

    async def _read_log(self, choice: Choice) -> m.Delta:
        """Return the tokens in a choice's log after its cursor. Raises Unavailable if the queue lost the request."""
        limit = log_limit(choice)
        read = partial(self._replies.read_log, choice.rid, choice.cursor, choice.record_bytes, limit)
        delta = await self._insist(read)
        if delta is None:
            await self._mend()
            delta = await self._insist(read)
        if delta is None:
            self._open.discard(choice.rid)
            raise Unavailable(f"the queue no longer has the request {choice.rid}", code="request_lost")
        if limit and len(delta.ids) >= 4 * limit:
            self._mail.nudge()  # the next `advance` reads the rest
        return delta

    async def _insist(self, do: Callable[[], Awaitable[T]]) -> T:
        """Retry an action on the queue until it can be reached. Raises a connection error after the deadline."""
        while True:
            try:
                return await do()
            except CONNECTION_ERRORS:
                if now_ms() > self.call.deadline_ms:
                    raise
                await asyncio.sleep(RECONNECT_S)


def usage_of(choices: Sequence[Choice]) -> CallUsage:
    """Return the token counts of choices so far. A prompt counts once, with the cached tokens of its first choice."""
    prompts = {id(choice.prompt): choice for choice in reversed(choices)}.values()
    return CallUsage(
        prompt_tokens=sum(choice.prompt.num_tokens for choice in prompts),
        completion_tokens=sum(choice.num_output_tokens for choice in choices),
        cached_tokens=sum(choice.num_cached_tokens for choice in prompts),
    )


def log_limit(choice: Choice) -> int:
    """Return how many tokens of a choice are read, decoded and written at a time; 0 for no limit."""
    if choice.options.output == "numbers":
        return 0
    if choice.record_bytes:
        return choice.options.rows
    if choice.options.sampling.stop_regex:
        return REGEX_TOKENS
    return MATCHED_TOKENS if choice.options.stop else TEXT_TOKENS


def choices_of(call: SubmittedCall) -> list[Choice]:
    """Return the choices of a call in the API's order: for each target, for each prompt, `n` choices."""
    options = call.parsed.options
    return [Choice(i, rid, call.prompts[i // options.n], options) for i, rid in enumerate(call.rids)]
