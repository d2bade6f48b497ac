"""The batches that this gateway runs, each while it holds the batch's lease; another gateway continues from there.

An error that blocks a batch is logged and counted. Any gateway retries it after growing pauses, up to a limit.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from contextlib import suppress

from gateway.batches.run import BatchMeans, BatchRun, Lost
from protocol.metrics.series import GIVEN_UP
from protocol.queue.bus import CONNECTION_ERRORS
from protocol.queue.kept.batches import ClaimedBatch
from protocol.runtime.guarded import FAILED, Loop, is_failure, is_queue_away
from protocol.wire.errors import NewerRecord

logger = logging.getLogger(__name__)

_LOOKED_AT = 64  # open batches considered for running, of new ones and of begun ones each
_MAX_NEWER = 1000  # maximum remembered batches that only newer gateways can read


class BatchRunner:
    """Runs batches that no other gateway runs."""

    def __init__(self, means: BatchMeans, wake: asyncio.Event) -> None:
        """wake: set when there may be a batch to run."""
        self._means = means
        self._bus = means.bus
        self._pace = means.pace
        self._running: dict[str, asyncio.Task[None]] = {}  # by batch id
        self._tenants: dict[str, str] = {}  # tenant by batch id, of those that hold a place
        self._wake = wake
        self._num_places = 0  # slots of all workers
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

        A tenant's batches that have begun come first. If there is no room, a tenant without a running batch gets the
        place of the newest batch of a tenant with several, so that two tenants cannot hold all places for a day.
        """
        pace = self._pace
        if self._running:
            self._num_places = await self._places()
        if len(self._tenants) >= pace.max_batches and self._newest_of_several() is None:
            return
        waiting = [
            (tenant, batch_id)
            for tenant, batch_id in await self._bus.batches.waiting(_LOOKED_AT)
            if batch_id not in self._running and batch_id not in self._newer
        ]
        while waiting:
            held = Counter(self._tenants.values())
            tenant, batch_id = min(waiting, key=lambda found: held[found[0]])
            is_full = len(self._tenants) >= pace.max_batches
            newest = self._newest_of_several() if is_full else None
            if held[tenant] >= pace.max_batches_of_tenant or (is_full and (held[tenant] or newest is None)):
                return
            waiting.remove((tenant, batch_id))
            claimed = await self._claim(batch_id, tenant)
            if claimed is None:
                continue
            if newest is not None and len(self._tenants) >= pace.max_batches:  # none has ended meanwhile
                del self._tenants[newest]
                self._running[newest].cancel()
            self._tenants[batch_id] = tenant
            self._running[batch_id] = asyncio.create_task(self._run(claimed))
            self._num_places = self._num_places or await self._places()

    def _newest_of_several(self) -> str | None:
        """Return the batch started last here of those of tenants with several; None without any.

        The older batch keeps its place, so that many short batches of others cannot interrupt a tenant's every batch.
        """
        held = Counter(self._tenants.values())
        return next((batch_id for batch_id, tenant in reversed(self._tenants.items()) if held[tenant] > 1), None)

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
            self._tenants.pop(batch_id, None)
            self._wake.set()

    async def _try(self, claimed: ClaimedBatch) -> None:
        """Run a batch once. After an error, any gateway retries it later; too many errors end the batch.

        Raises connection errors.
        """
        batch, pace = claimed.batch, self._pace
        run = BatchRun(self._means, claimed, self._num_calls)
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

    async def _places(self) -> int:
        """Return the total number of slots of all workers."""
        beats = await self._bus.members.worker_beats()
        return sum(beat.capacity for beat in beats.values() if beat is not None)

    def _num_calls(self) -> int:
        """Return how many lines of each batch this gateway may run at once."""
        most = max(self._pace.min_calls, math.ceil(self._pace.places * self._num_places))
        return max(1, min(most, self._means.settings.max_batch_calls) // max(1, len(self._running)))
