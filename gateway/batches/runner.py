"""The batches that this gateway runs, each while it holds the batch's lease; another gateway continues from there.

An error that blocks a batch is logged and counted. Any gateway retries it after growing pauses, up to a limit.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from gateway.batches.run import BatchMeans, BatchRun, Lost
from protocol.metrics.series import GIVEN_UP
from protocol.queue.bus import CONNECTION_ERRORS
from protocol.queue.kept.batches import ClaimedBatch
from protocol.runtime.guarded import FAILED, Loop, is_failure, is_queue_away
from protocol.wire.errors import NewerRecord

logger = logging.getLogger(__name__)

_LOOKED_AT = 64  # open batches considered for running, of new ones and of begun ones each
_MAX_NEWER = 1000  # maximum remembered batches that only newer gateways can read
_MAX_STARTED = 10_000  # maximum remembered tenants whose batches were started


@dataclass(slots=True)
class _Place:
    """A place that a batch holds."""

    tenant: str
    since_s: float  # time.monotonic()
    run: BatchRun | None = None  # None until it begins

    def may_yield(self, since_s: float) -> bool:
        """Return whether it may be given up, if held since `since_s` or longer."""
        return self.since_s <= since_s and not (self.run is not None and self.run.is_ending)


class BatchRunner:
    """Runs batches that no other gateway runs."""

    def __init__(self, means: BatchMeans, wake: asyncio.Event) -> None:
        """wake: set when there may be a batch to run."""
        self._means = means
        self._bus = means.bus
        self._pace = means.pace
        self._running: dict[str, asyncio.Task[None]] = {}  # by batch id
        self._places: dict[str, _Place] = {}  # by batch id: of those that do not leave, the first started first
        self._started: dict[str, float] = {}  # tenant -> time.monotonic() when its last batch was started here
        self._wake = wake
        self._turn_s = -math.inf  # time.monotonic() when a tenant's only batch was interrupted last
        self._num_slots = 0  # of all workers
        self._newer: dict[str, None] = {}  # batches that only newer gateways can read

    def loop(self) -> Loop:
        """Return the loop that starts batches. The caller must call `leave` after it."""
        return Loop("batches", self._look, self._pace.poll_s, self._wake)

    async def leave(self) -> None:
        """Release the running batches to other gateways."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        """Start batches while there is room, first for tenants with the fewest running here, up to each tenant's limit.

        Of tenants with as many, those whose batches started here least recently come first, then batches that have
        begun. If there is no room, a tenant without a running batch gets the place that `_given_up` names.
        """
        pace = self._pace
        if self._running:
            self._num_slots = await self._slots()
        if len(self._places) >= pace.max_batches and self._given_up() is None:
            return
        waiting = [
            (tenant, batch_id)
            for tenant, batch_id in await self._bus.batches.waiting(_LOOKED_AT)
            if batch_id not in self._running and batch_id not in self._newer
        ]
        while waiting:
            held = Counter(place.tenant for place in self._places.values())
            tenant, batch_id = min(waiting, key=lambda found: (held[found[0]], self._started.get(found[0], 0.0)))
            is_full = len(self._places) >= pace.max_batches
            given_up = self._given_up() if is_full else None
            if held[tenant] >= pace.max_batches_of_tenant or (is_full and (held[tenant] or given_up is None)):
                return
            waiting.remove((tenant, batch_id))
            claimed = await self._claim(batch_id, tenant)
            if claimed is None:
                continue
            if given_up is not None and len(self._places) >= pace.max_batches:  # none has ended meanwhile
                self._interrupt(given_up)
            self._start(claimed)
            self._num_slots = self._num_slots or await self._slots()

    def _start(self, claimed: ClaimedBatch) -> None:
        batch, now_s = claimed.batch, time.monotonic()
        self._places[batch.id] = _Place(batch.tenant, now_s)
        self._started.pop(batch.tenant, None)
        self._started[batch.tenant] = now_s
        if len(self._started) > _MAX_STARTED:
            del self._started[next(iter(self._started))]
        self._running[batch.id] = asyncio.create_task(self._run(claimed))

    def _interrupt(self, batch_id: str) -> None:
        """Release a batch to be continued later, unless it ends now: its place is free soon."""
        place = self._places.get(batch_id)
        if place is None or (place.run is not None and place.run.is_ending):
            return
        if self._num_of(place.tenant) == 1:
            self._turn_s = time.monotonic()
        del self._places[batch_id]
        self._running[batch_id].cancel()

    def _num_of(self, tenant: str) -> int:
        return sum(place.tenant == tenant for place in self._places.values())

    def _given_up(self) -> str | None:
        """Return the batch whose place a tenant without any gets, None without such: no tenants keep all for a day.

        First the newest batch of a tenant with several: the older one keeps its place, so that many short batches of
        others cannot interrupt a tenant's every batch. Then the batch that was started first. Each has a minimum of
        time, since its input is read again when it continues, and none is interrupted while it ends. Turns end one
        after the other: otherwise the tenant whose turn has ended would at once end that of the next.
        """
        now_s, pace = time.monotonic(), self._pace
        newest = {place.tenant: batch_id for batch_id, place in self._places.items()}
        alone = {tenant for tenant in newest if self._num_of(tenant) == 1}
        for batch_id, place in reversed(self._places.items()):
            is_second = batch_id == newest[place.tenant] and place.tenant not in alone
            if is_second and place.may_yield(now_s - pace.second_s):
                return batch_id
        if now_s < self._turn_s + pace.turn_s / pace.max_batches:
            return None
        oldest = (name for name, place in self._places.items() if place.tenant in alone)
        return next((name for name in oldest if self._places[name].may_yield(now_s - pace.turn_s)), None)

    async def _claim(self, batch_id: str, tenant: str) -> ClaimedBatch | None:
        try:
            return await self._bus.batches.claim(batch_id, tenant, self._means.gid, int(self._pace.lease_s * 1000))
        except NewerRecord as error:  # a newer gateway takes over when this lease expires
            FAILED.note("batches", error, batch_id)
            self._newer[batch_id] = None
            if len(self._newer) > _MAX_NEWER:
                del self._newer[next(iter(self._newer))]
            return None

    async def _run(self, claimed: ClaimedBatch) -> None:
        """Run a batch until it has ended, moved to another gateway, or been postponed."""
        batch_id, num_away, going_on = claimed.batch.id, 0, claimed
        try:
            while going_on is not None:
                try:
                    await self._try(going_on)
                    going_on = None
                except CONNECTION_ERRORS as error:  # the queue is unreachable, so nothing can be recorded there
                    FAILED.note("batches", error, batch_id)
                    num_away += 1
                    await asyncio.sleep(self._pace.retry.pause_s(num_away))
                    with suppress(*CONNECTION_ERRORS):
                        going_on = await self._claim(batch_id, claimed.batch.tenant)
        except Exception as error:  # noqa: BLE001  its lease expires, and it is retried
            FAILED.note("batches", error, batch_id)
        finally:
            del self._running[batch_id]
            self._places.pop(batch_id, None)
            self._wake.set()

    async def _try(self, claimed: ClaimedBatch) -> None:
        """Run a batch once. After an error, any gateway retries it later; too many errors end the batch.

        Raises connection errors.
        """
        batch, pace = claimed.batch, self._pace
        run = BatchRun(self._means, claimed, self._num_calls)
        if place := self._places.get(batch.id):
            place.run = run
        try:
            try:
                await run.run()
            except asyncio.CancelledError:
                with suppress(*CONNECTION_ERRORS):
                    await run.leave()
                raise
            except BaseException as error:
                if not is_failure(error) or is_queue_away(error) or isinstance(error, Lost):
                    raise
                FAILED.note("batches", error, batch.id)
                tries = run.tries + 1
                if tries < pace.max_tries:
                    await run.leave(pace.retry.pause_s(tries), tries)
                else:
                    GIVEN_UP.labels("batches").inc()
                    await run.give_up(error, tries)
        except Lost:
            logger.warning("batch %s now runs on another gateway, or has ended", batch.id)

    async def _slots(self) -> int:
        """Return the total number of slots of all workers."""
        beats = await self._bus.members.worker_beats()
        return sum(beat.capacity for beat in beats.values() if beat is not None)

    def _num_calls(self) -> int:
        """Return how many lines of each batch this gateway may run at once."""
        most = max(self._pace.min_calls, math.ceil(self._pace.calls_per_slot * self._num_slots))
        return max(1, min(most, self._means.settings.max_batch_calls) // max(1, len(self._running)))
