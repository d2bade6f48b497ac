"""A call's requests while they run: waits for deltas, brings them into order, and cancels what nobody waits for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from gateway.calls.choices import Choice, Piece
from gateway.calls.replies import Replies
from gateway.calls.waiting import waiting_state
from gateway.calls.writers import Usage
from gateway.lorax import metrics as lorax_metrics
from protocol.queue.bus import CONNECTION_ERRORS, RequestFacts, now_ms
from protocol.runtime.metrics import (
    CALL_SECONDS,
    FIRST_TOKEN_SECONDS,
    GENERATIONS,
    KIND_ADAPTER,
    KIND_BASE,
    OUTPUT_TOKENS,
)
from protocol.wire import messages as m
from protocol.wire.errors import DeadlineExceeded, LorafleetError, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE_SLACK_MS = 5000  # the scheduler ends late requests; this is for when there is none
RECONNECT_S = 0.2


class ClientGoneError(Exception):
    """The client has hung up: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a call is followed."""

    deadline_ms: int
    eager: bool  # tokens are wanted as they come, not only the end
    durable: bool = False  # its requests live on without their client
    poll_s: float = 0.0  # how often to look into the log, when another gateway gets the deltas; 0: they come here
    adapter: bool = False
    empty: bool = False  # no token is wanted: nothing was submitted


class Generation:
    """The choices of one HTTP call. Use: `advance` until `is_done`, then `close`, which must always be called."""

    def __init__(self, replies: Replies, choices: Sequence[Choice], terms: Terms) -> None:
        self.choices = choices
        self._replies = replies
        self._terms = terms
        self._by_rid = {choice.rid: choice for choice in choices}
        self._open = {choice.rid for choice in choices}
        self.mail = replies.subscribe(list(self._by_rid), eager=terms.eager)
        self.resubmit: Callable[[], Awaitable[object]] | None = None  # repeatable; for a queue that has lost them
        self._started_s = time.monotonic()
        self._has_token = False
        self._kind = KIND_ADAPTER if terms.adapter else KIND_BASE

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    @property
    def usage(self) -> Usage:
        """Tokens of the call so far."""
        prompts = {id(choice.prompt): choice for choice in self.choices}.values()
        return Usage(
            prompt_tokens=sum(choice.prompt.num_tokens for choice in prompts),
            completion_tokens=sum(choice.num_output_tokens for choice in self.choices),
            cached_tokens=sum(choice.num_cached_tokens for choice in prompts),
        )

    async def facts(self) -> RequestFacts | None:
        """Return what the queue says of the first choice; None when it does not know it, or cannot be reached."""
        try:
            return (await self._replies.bus.requests([self.choices[0].rid]))[0]
        except CONNECTION_ERRORS as error:
            logger.warning("the times of a call cannot be read: %s", error)
            return None

    def hang_up(self) -> None:
        """Say that the client has gone; `advance` raises ClientGoneError."""
        self.mail.hang_up()

    async def advance(self, timeout_s: float) -> list[Piece]:
        """Wait for progress and return it, one piece per choice; [] when there is none in `timeout_s`.

        Raises the error that ended a request, and ClientGoneError.
        """
        if self._terms.empty:
            return self._skip_all()
        poll_s = self._terms.poll_s
        deltas = await self.mail.take(min(poll_s, timeout_s) if poll_s else timeout_s)
        if self.mail.client_gone:
            raise ClientGoneError
        if self.mail.failure is not None:
            raise self.mail.failure
        pieces: dict[str, Piece] = {}
        for delta in deltas:
            choice = self._by_rid[delta.rid]
            if choice.cursor.needs_log(delta):
                await self._take(choice, await self._read_log(choice), pieces)
                if choice.cursor.needs_log(delta):
                    # The queue has lost what stood before it; its owner, or whoever comes after, will write that again.
                    continue
            await self._take(choice, delta, pieces)
        if self.mail.restarted:
            self.mail.restarted = False
            await self._mend()
        if not deltas or self.mail.nudged:
            self.mail.nudged = False
            await self._catch_up(pieces)
        if pieces and not self._has_token:
            self._has_token = True
            FIRST_TOKEN_SECONDS.labels(self._kind).observe(time.monotonic() - self._started_s)
        return list(pieces.values())

    async def waiting_for(self) -> str:
        """Return in a few words what a call waits for that has shown nothing yet; "" once it has."""
        if self._has_token or not self._open:
            return ""
        first = next(choice.rid for choice in self.choices if choice.rid in self._open)
        try:
            return await waiting_state(self._replies.bus, first)
        except CONNECTION_ERRORS:
            return "the queue cannot be reached"

    async def close(self) -> None:
        """Stop following. Requests that still run are cancelled, unless they are durable."""
        self._replies.unsubscribe(self.mail)
        OUTPUT_TOKENS.labels(self._kind).inc(sum(choice.num_output_tokens for choice in self.choices))
        if self.is_done:
            seconds = time.monotonic() - self._started_s
            CALL_SECONDS.labels(self._kind).observe(seconds)
            lorax_metrics.succeeded(seconds, self.usage.completion_tokens)
        elif not self._terms.durable:
            try:
                await asyncio.gather(*(self._replies.bus.cancel(rid) for rid in self._open))
            except CONNECTION_ERRORS as error:
                # They end at their deadline, or when the scheduler sees that this gateway is gone.
                logger.warning("%d requests could not be cancelled: %s", len(self._open), error)

    # ------------------------------------------------------------ order

    def _skip_all(self) -> list[Piece]:
        pieces = [Piece(choice.index) for choice in self.choices]
        for choice, piece in zip(self.choices, pieces, strict=True):
            choice.skip(piece)
        self._open.clear()
        return pieces

    async def _mend(self) -> None:
        """Give a queue that came back without its last second what it has lost of the open requests."""
        if self.resubmit is not None:
            await self._insist(self.resubmit)
        for rid in self._open:
            choice = self._by_rid[rid]
            choice.cursor.epoch = 0  # owners are counted from what the queue still knows
            ids, records = choice.shown
            if ids:
                repair = partial(self._replies.bus.repair, rid, 0, ids, records, choice.record_bytes)
                await self._insist(repair)

    async def _catch_up(self, pieces: dict[str, Piece]) -> None:
        """Look into the logs of all open requests: what was not delivered is there."""
        for rid in list(self._open):
            choice = self._by_rid[rid]
            delta = await self._read_log(choice)
            if delta.ids or delta.finish:
                await self._take(choice, delta, pieces)
        if self._open and now_ms() > self._terms.deadline_ms + DEADLINE_SLACK_MS:
            raise DeadlineExceeded("the request took longer than it may")

    async def _take(self, choice: Choice, delta: m.Delta, pieces: dict[str, Piece]) -> None:
        if choice.cursor.is_stale(delta):
            return
        if choice.needs_prompt and delta.ids:
            found = await self._insist(partial(self._replies.bus.prompt_logprobs, choice.rid))
            if found is None:
                raise Unavailable("the queue has lost the logprobs of a prompt", code="request_lost")
            choice.give_prompt(*found)
        piece = pieces.setdefault(choice.rid, Piece(choice.index))
        try:
            choice.take(delta, piece)
        except LorafleetError:
            self._open.discard(choice.rid)
            GENERATIONS.labels(delta.finish).inc()
            raise
        if piece.finish and choice.rid in self._open:
            self._open.discard(choice.rid)
            GENERATIONS.labels(piece.finish).inc()

    async def _read_log(self, choice: Choice) -> m.Delta:
        """Return what a choice's log holds beyond its cursor, however long the queue cannot be reached."""
        read = partial(self._replies.read_log, choice.rid, choice.cursor, choice.record_bytes)
        delta = await self._insist(read)
        if delta is None:
            await self._mend()
            delta = await self._insist(read)
        if delta is None:
            self._open.discard(choice.rid)
            raise Unavailable(f"the queue does not know the request {choice.rid} any more", code="request_lost")
        return delta

    async def _insist(self, do: Callable[[], Awaitable[T]]) -> T:
        """Do something on the queue, however long it cannot be reached before the deadline."""
        while True:
            try:
                return await do()
            except CONNECTION_ERRORS:
                if now_ms() > self._terms.deadline_ms:
                    raise
                await asyncio.sleep(RECONNECT_S)
