"""The batches that this gateway runs: each for as long as it says so to the queue, and the next gateway from there on.

A batch is read twice: its lines are checked, then run in an order that suits adapters and prefix caches, a few at a
time. Answers are written in parts; a line without one is asked again after a crash, under the same Idempotency-Key, so
that what the fleet has computed is found and not computed anew.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import orjson

from gateway.anthropic.errors import OVERLOADED
from gateway.auth.callers import Caller
from gateway.batches.calls import InnerCalls
from gateway.batches.lines import InputLines, Line, read_lines
from gateway.batches.results import KINDS, Answer, Kind, Results, answer_of, failure_of
from gateway.calls.submit import cancel
from gateway.files.files import HELD_S, FileService
from gateway.files.storage import Storage
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.queue.kept.batches import ClaimedBatch
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, NotFound, Overloaded

T = TypeVar("T")

logger = logging.getLogger(__name__)

RETRIED = frozenset({429, 502, 503, OVERLOADED})
"""Statuses that tell of a fleet that is busy, and not of the line."""

_LOOKED_AT = 64  # open batches, when the next one to run is chosen


@dataclass(frozen=True, slots=True)
class BatchPace:
    """What operators do not set, but tests."""

    poll_s: float = 1.0  # pause between looks for batches that nobody runs
    lease_s: float = 10.0  # silence after which another gateway takes a batch over
    beat_s: float = 2.0  # pause between two words that a batch goes on, with its counts
    min_calls: int = 8  # that run at once, however small the fleet is
    max_batches: int = 4  # that one gateway runs at once; the others wait
    places: float = 1.25  # calls that run at once, per place that the workers have


@dataclass(frozen=True, slots=True)
class BatchMeans:
    """What a gateway runs batches with."""

    bus: Bus
    gid: str  # this gateway
    files: FileService
    storage: Storage
    settings: Settings
    calls: InnerCalls
    pace: BatchPace = field(default_factory=BatchPace)


class Lost(Exception):
    """Another gateway runs the batch, or it has ended."""


class BatchRunner:
    """Runs batches that nobody else does."""

    def __init__(self, means: BatchMeans, wake: asyncio.Event) -> None:
        """wake: set when there may be a batch to run."""
        self._means = means
        self._bus = means.bus
        self._pace = means.pace
        self._running: dict[str, asyncio.Task[None]] = {}  # by batch id
        self._tenants: dict[str, str] = {}  # of those
        self._wake = wake
        self._num_places = 0  # of all workers

    async def run(self) -> None:
        """Run batches until cancelled; then leave them to other gateways."""
        try:
            while True:
                try:
                    await self._look()
                except CONNECTION_ERRORS as error:
                    logger.warning("no batch can be looked for: %s", error)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pace.poll_s):
                        await self._wake.wait()
                self._wake.clear()
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        """Begin batches while there is room, first of tenants that have the fewest here."""
        if self._running:
            self._num_places = await self._places()
        if len(self._running) >= self._pace.max_batches:
            return
        waiting = [
            (tenant, batch_id) for tenant, batch_id in await self._bus.batches.waiting(_LOOKED_AT)
            if batch_id not in self._running
        ]  # fmt: skip
        while waiting and len(self._running) < self._pace.max_batches:
            held = list(self._tenants.values())
            tenant, batch_id = min(waiting, key=lambda found: held.count(found[0]))
            waiting.remove((tenant, batch_id))
            lease_ms = int(self._pace.lease_s * 1000)
            claimed = await self._bus.batches.claim(batch_id, tenant, self._means.gid, lease_ms)
            if claimed is None:
                continue
            self._num_places = self._num_places or await self._places()
            self._tenants[batch_id] = tenant
            self._running[batch_id] = asyncio.create_task(self._run(claimed))

    async def _run(self, claimed: ClaimedBatch) -> None:
        batch = claimed.batch
        run = BatchRun(self._means, claimed, self._num_calls)
        try:
            await run.run()
        except Lost:
            logger.warning("batch %s is run by another gateway", batch.id)
        except asyncio.CancelledError:
            with suppress(*CONNECTION_ERRORS):
                await run.leave()
            raise
        except (LorafleetError, *CONNECTION_ERRORS) as error:
            logger.warning("batch %s stops here, and is taken up again: %s", batch.id, error)
        except Exception:
            logger.exception("batch %s stops here, and is taken up again", batch.id)
        finally:
            del self._running[batch.id], self._tenants[batch.id]
            self._wake.set()

    async def _places(self) -> int:
        """Return how many requests all workers can run at once."""
        beats = await self._bus.members.worker_beats()
        return sum(beat.capacity for beat in beats.values() if beat is not None)

    def _num_calls(self) -> int:
        """How many lines each batch of this gateway may have running."""
        most = max(self._pace.min_calls, math.ceil(self._pace.places * self._num_places))
        return max(1, min(most, self._means.settings.max_batch_calls) // max(1, len(self._running)))


class BatchRun:
    """One batch while this gateway runs it."""

    def __init__(self, means: BatchMeans, claimed: ClaimedBatch, num_calls: Callable[[], int]) -> None:
        """num_calls: tells how many of its lines may run now."""
        self._means = means
        self._bus = means.bus
        self._settings = means.settings
        self._num_calls = num_calls
        self.batch = claimed.batch
        self._epoch = claimed.epoch
        self._results = Results(means.storage, self.batch.id, claimed.epoch)
        self._is_cancelled = asyncio.Event()
        self._no_room: m.BatchProblem | None = None  # why its tenant may have no more files
        if claimed.cancelled_ms:
            self._cancel(claimed.cancelled_ms)

    async def run(self) -> None:
        """Run the batch to its end. Raises Lost, NotFound, Unavailable and connection errors."""
        try:
            async with asyncio.TaskGroup() as group:
                beating = group.create_task(self._beat())
                try:
                    await self._work()
                finally:
                    beating.cancel()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def leave(self) -> None:
        """Write what there is, and let another gateway go on at once."""
        with suppress(LorafleetError):
            await self._flush()
        await self._bus.batches.save(self._counted(), self._epoch, leaves=True)

    async def _beat(self) -> None:
        """Say that the batch goes on, and how far it is; notice that it was cancelled. Raises Lost."""
        pace = self._means.pace
        deadline = asyncio.get_running_loop().time() + pace.lease_s
        while True:
            await asyncio.sleep(pace.beat_s)
            try:
                batch = self.batch
                lease_ms = int(pace.lease_s * 1000)
                claimed = await self._bus.batches.claim(batch.id, batch.tenant, self._means.gid, lease_ms)
                if claimed is None or claimed.epoch != self._epoch:
                    raise Lost
                deadline = asyncio.get_running_loop().time() + pace.lease_s
                if claimed.cancelled_ms:
                    self._cancel(claimed.cancelled_ms)
                if self.batch.status == "in_progress":
                    await self._flush()
                    await self._save()
            except CONNECTION_ERRORS as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise Lost from error

    def _cancel(self, cancelled_ms: int) -> None:
        self.batch = msgspec.structs.replace(self.batch, cancelling_ms=cancelled_ms)
        self._is_cancelled.set()

    # ------------------------------------------------------------ stages

    async def _work(self) -> None:
        """Take the batch from where it is to its end."""
        source = await self._bus.files.get(self.batch.input_file, self.batch.tenant)
        if source is None:
            await self._fail("file_not_found", "the input file was deleted, or has expired")
            return
        chunks = self._means.files.read(source)
        try:
            found = await read_lines(chunks, self.batch.endpoint, self._settings.max_body_bytes)
        except NotFound:
            await self._fail("file_not_found", "the input file was deleted")
            return
        if found.problems:
            await self._save(status="failed", problems=found.problems, ended_ms=now_ms())
            return
        await self._results.load()
        with self._within_limits():
            await self._hold(self._results.file_bytes)
        begun_ms = self.batch.in_progress_ms or now_ms()
        await self._save(status="in_progress", in_progress_ms=begun_ms, total=len(found.lines), model=found.model)
        end = await self._run_lines(found, source) if self._no_room is None else "completed"
        await self._save(status="finalizing", finalizing_ms=self.batch.finalizing_ms or now_ms())
        await self._give_up(found, source, end)
        await self._flush()
        if self._no_room is None:
            await self._end(end)
            return
        await self._count_anew()  # what was not written is no answer
        await self._end("failed" if end == "completed" else end, problems=[self._no_room])

    async def _run_lines(self, found: InputLines, source: m.File) -> m.BatchStatus:
        """Run the lines that have no answer, a few at a time. Returns how the batch ends."""
        caller = await self._caller()
        todo = (line for line in found.in_order() if line.number not in self._results.tally.done)
        cancelled = asyncio.create_task(self._is_cancelled.wait())
        running: set[asyncio.Task[Any]] = {cancelled}
        end: m.BatchStatus = "completed"
        try:
            async with asyncio.timeout(max(0.0, (self.batch.expires_ms - now_ms()) / 1000)):
                for line in todo:
                    running.add(asyncio.create_task(self._run_line(line, source, caller)))
                    await _wait(running, cancelled, self._num_calls())
                    if cancelled.done():
                        break
                await _wait(running, cancelled, 1)
            if cancelled.done() and self._no_room is None:
                end = "cancelled"
        except TimeoutError:
            end = "expired"
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if end != "completed" or self._no_room is not None:
            await self._end_requests(found.lines, caller)
        return end

    async def _end(self, status: m.BatchStatus, **changes: object) -> None:
        """Write the output files and the end of the batch."""
        output, errors = await self._write("output"), await self._write("error")
        await self._save(status=status, ended_ms=now_ms(), output_file=output, error_file=errors, **changes)
        await self._results.forget()

    async def _write(self, kind: Kind) -> str:
        """Write an output file. Returns its id, "" when there is nothing in it."""
        batch = self.batch
        life_s = float(batch.output_life_s or self._settings.file_ttl_s)
        made = await self._means.files.make(
            self._file_id(kind), batch.tenant, f"{batch.id}_{kind}.jsonl", self._results.file(kind), life_s
        )
        return made.id if made is not None else ""

    def _file_id(self, kind: Kind) -> str:
        return f"file-{self.batch.id.removeprefix('batch_')}-{kind}"

    async def _hold(self, file_bytes: Mapping[Kind, int]) -> None:
        """Hold room for the two files among the tenant's. Raises Overloaded if it has none."""
        until_ms = max(now_ms(), self.batch.expires_ms) + int(HELD_S * 1000)
        for kind in KINDS:
            num_bytes = file_bytes.get(kind, 0)
            if num_bytes or kind == "output":
                await self._means.files.hold_output(self._file_id(kind), self.batch.tenant, num_bytes, until_ms)

    @contextmanager
    def _within_limits(self) -> Generator[None]:
        """End the batch with what is written when its tenant may have no more files, or bytes in them."""
        try:
            yield
        except Overloaded as error:
            self._no_room = m.BatchProblem(code="file_limit", message=error.message)
            self._is_cancelled.set()

    async def _count_anew(self) -> None:
        """Count the answers that are written, and no others."""
        self._results = Results(self._means.storage, self.batch.id, self._epoch)
        await self._results.load()

    async def _give_up(self, found: InputLines, source: m.File, end: m.BatchStatus) -> None:
        """Note for every line without an answer why it has none."""
        if end == "completed":
            return
        code, why = ("batch_expired", "the batch expired before this line was answered")
        if end == "cancelled":
            code, why = ("batch_cancelled", "the batch was cancelled before this line was answered")
        for line in found.lines:
            if self._no_room is not None:
                return
            if line.number in self._results.tally.done:
                continue
            custom_id, _ = await self._read(line, source)
            await self._take(failure_of(line.number, custom_id, code, why))

    async def _fail(self, code: str, message: str) -> None:
        """End the batch for want of its input, with the answers that it has."""
        await self._results.load()
        await self._end("failed", problems=[m.BatchProblem(code=code, message=message)])

    # ------------------------------------------------------------ lines

    async def _run_line(self, line: Line, source: m.File, caller: Caller) -> None:
        """Ask the endpoint for one line's answer, until it is not too busy to give one."""
        custom_id, body = await self._read(line, source)
        refused = next((name for name in ("stream", "background") if body.get(name)), None)
        if refused is not None:
            text = f"{refused} cannot be true in a batch"
            await self._take(failure_of(line.number, custom_id, "invalid_request", text))
            return
        raw = orjson.dumps(body)
        del body
        while True:
            answer = await self._means.calls.post(self.batch.endpoint, raw, caller, self._key(line))
            if answer.status not in RETRIED:
                break
            await asyncio.sleep(answer.retry_after_s * random.uniform(1.0, 1.5))
        request_id = answer.headers.get("x-request-id", "")
        await self._take(answer_of(line.number, custom_id, answer.status, request_id, answer.body))

    async def _take(self, answer: Answer) -> None:
        """Take a line's answer, and write those that wait if they are many."""
        self._results.add(answer)
        if self._results.is_full:
            await self._flush()

    async def _read(self, line: Line, source: m.File) -> tuple[str, dict[str, object]]:
        """Return a line's custom_id and body."""
        raw = b"".join([chunk async for chunk in self._means.files.read(source, line.start, line.end)])
        value = orjson.loads(raw)
        return value["custom_id"], value["body"]

    def _key(self, line: Line) -> str:
        return f"{self.batch.id}:{line.number}"

    async def _caller(self) -> Caller:
        """Return whose calls the lines are."""
        keys = self._settings.api_keys
        tenant = await self._bus.api_keys.tenant(self.batch.tenant) if keys else None
        return Caller(tenant, ("infer",), until_ms=self.batch.expires_ms)

    async def _end_requests(self, lines: Sequence[Line], caller: Caller) -> None:
        """End what still runs in the queue of lines that nobody waits for."""
        open_lines = [line for line in lines if line.number not in self._results.tally.done]
        for some in _slices(open_lines, 256):
            keys = [self._bus.keys.idem(caller.owner, self._key(line)) for line in some]
            for record in await self._bus.get_many(keys, m.Idempotent):
                if record is not None:
                    await cancel(self._bus, record.rids)

    # ------------------------------------------------------------ storage

    async def _flush(self) -> None:
        """Write the answers that wait, if their tenant has room, then let the queue forget their requests."""
        numbers: list[int] = []
        if self._no_room is None:
            with self._within_limits():
                numbers = await self._results.flush(self._hold)
        for some in _slices(numbers, 256):
            keys = [self._bus.keys.idem(self.batch.tenant, f"{self.batch.id}:{number}") for number in some]
            records = await self._bus.get_many(keys, m.Idempotent)
            found = [(key, record) for key, record in zip(keys, records, strict=True) if record is not None]
            await asyncio.gather(*(self._bus.forget_call(key, record.rids) for key, record in found))

    def _counted(self) -> m.Batch:
        tally = self._results.tally
        return msgspec.structs.replace(
            self.batch, completed=tally.completed, failed=tally.failed, usage=tally.usage
        )  # fmt: skip

    async def _save(self, **changes: object) -> None:
        """Write how far the batch is. Raises Lost."""
        self.batch = msgspec.structs.replace(self._counted(), **changes)
        if not await self._bus.batches.save(self.batch, self._epoch):
            raise Lost


async def _wait(running: set[asyncio.Task[Any]], cancelled: asyncio.Task[Any], num: int) -> None:
    """Wait until fewer than `num` others run, or until `cancelled` is done. Raises what a task has raised."""
    while len(running) > num and not cancelled.done():
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        running -= done - {cancelled}
        for task in done:
            task.result()


def _slices(values: Sequence[T], num: int) -> Iterator[Sequence[T]]:
    """Yield a list in parts of `num`."""
    return (values[i : i + num] for i in range(0, len(values), num))
