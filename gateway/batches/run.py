"""Runs one batch in this gateway: checks its lines, calls their endpoint, writes their answers, and ends it.

The input is read twice: its lines are checked, then run a few at a time in an order that suits adapters and prefix
caches. Answers are written in parts. After a crash, a line without an answer is called again with the same
Idempotency-Key, so that results in the queue are reused.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec

from gateway.auth.callers import Caller
from gateway.batches.inner_calls import InnerCalls
from gateway.batches.lines import BatchLine, InputLines, LineCall, call_of, read_lines, turn_of
from gateway.batches.results import KINDS, Kind, LineAnswer, Results, answer_of, failure_of
from gateway.files.files import HELD_S, FileService
from gateway.files.storage import Storage
from gateway.http.paths import SMALL_BODY_BYTES
from gateway.overload.large import PLAIN_BYTES, Checks
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.queue.kept.batches import ClaimedBatch
from protocol.runtime.backoff import Backoff
from protocol.runtime.fair_slots import FairSlots
from protocol.runtime.guarded import FAILED, is_failure, is_queue_away
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, NotFound, Overloaded, Unavailable

T = TypeVar("T")
End = Literal["completed", "expired", "cancelled"]

logger = logging.getLogger(__name__)

RETRIED = frozenset({429, 502, 503, 529})
"""Statuses caused by a busy fleet, not by the line."""


RETRY = Backoff(1.0, 600.0)


@dataclass(frozen=True, slots=True)
class BatchPace:
    """Timings and limits that tests set, not operators."""

    poll_s: float = 1.0  # seconds between searches for batches that are not running
    lease_s: float = 10.0  # seconds without renewal after which another gateway takes over a batch
    beat_s: float = 2.0  # seconds between renewals of a batch's lease and counts
    min_calls: int = 8  # calls run at once, however small the fleet is
    max_batches: int = 4  # batches run by one gateway at once; others wait
    max_batches_of_tenant: int = 2  # batches of one tenant among them
    second_s: float = 60.0  # seconds after which a tenant's newer batch gives its place to a tenant without any
    turn_s: float = 600.0  # seconds after which any batch does
    retry: Backoff = RETRY  # before a retry of a batch that failed with an error
    max_tries: int = 20  # consecutive tries without progress, about two hours, before the batch fails
    calls_per_slot: float = 1.25  # calls run at once, per slot of the workers


@dataclass(frozen=True, slots=True)
class BatchMeans:
    """The dependencies of running batches."""

    bus: Bus
    gid: str  # id of this gateway
    files: FileService
    storage: Storage
    settings: Settings
    calls: InnerCalls
    checks: Checks  # reads large lines and answers
    pace: BatchPace = field(default_factory=BatchPace)
    turns: FairSlots = field(default_factory=lambda: FairSlots(1))  # turns to hold a large line until its call has it


class Lost(Exception):
    """Another gateway runs the batch, or it has ended."""


class BatchRun:
    """One batch while this gateway runs it."""

    def __init__(self, means: BatchMeans, claimed: ClaimedBatch, num_calls: Callable[[], int]) -> None:
        """num_calls: returns how many of its lines may run now."""
        self._means = means
        self._bus = means.bus
        self._settings = means.settings
        self._num_calls = num_calls
        self.batch = claimed.batch
        self._epoch = claimed.epoch
        self._tries = claimed.tries
        self._found: InputLines | None = None
        self._num_done = -1  # answered lines when tries were last counted; -1: unknown
        self._results = Results(means.storage, self.batch.id, claimed.epoch)
        self._is_stopped = asyncio.Event()  # set if cancelled or out of space: no further line is called
        self._no_room: m.BatchProblem | None = None  # why its tenant may store no more
        if claimed.cancelled_ms:
            self._cancel(claimed.cancelled_ms)

    async def run(self) -> None:
        """Run the batch to its end. Raises Lost, Unavailable, connection errors, and any other error."""
        try:
            async with asyncio.TaskGroup() as group:
                beating = group.create_task(self._beat())
                try:
                    await self._work()
                finally:
                    beating.cancel()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    @property
    def is_ending(self) -> bool:
        """Whether its lines are done, so that its place is free soon."""
        return self.batch.status == "finalizing"

    @property
    def tries(self) -> int:
        """Number of consecutive earlier tries without progress; 0 once this one has answered a line."""
        return 0 if 0 <= self._num_done < self._results.num_written else self._tries

    async def leave(self, wait_s: float = 0.0, tries: int | None = None) -> None:
        """Write the answers so far and release the batch; it may continue after `wait_s`.

        tries: new count, None: unchanged.
        """
        try:
            await self._flush()
        except Exception as error:  # unwritten answers are found again by their keys
            if is_queue_away(error):
                raise
            FAILED.note("batches", error, self.batch.id)
        await self._bus.batches.save(self._counted(), self._epoch, leaves=True, wait_ms=int(1000 * wait_s), tries=tries)

    async def give_up(self, error: BaseException, tries: int) -> None:
        """End the batch because of a persistent error, with the answers so far. Raises Lost, connection errors.

        If the answers cannot be written to the final files, or their parts not be deleted, these remain in the storage,
        and the log names the folder.
        """
        if self._has_files:
            logger.error("the parts of batch %s remain in the storage, in %s", self.batch.id, self._results.folder)
            await self._end_with_files()
            return
        code = "storage_unavailable" if isinstance(error, Unavailable) else "internal_error"
        why = error.message if isinstance(error, LorafleetError) else "the gateway failed while running the batch"
        problem = m.BatchProblem(code=code, message=f"given up after {tries} tries: {why}")
        status: m.BatchStatus = "cancelled" if self.batch.cancelling_ms else "failed"
        logger.error("batch %s is %s, %s", self.batch.id, status, problem.message)
        try:
            if self._found is not None:
                await self._end_requests(self._found.lines, await self._caller())
            await self._results.load()
            await self._flush()
            await self._end(status, problems=[problem])
        except Lost:
            raise
        except Exception as second:
            if is_queue_away(second):
                raise
            logger.exception("answers of batch %s remain in the storage, in %s", self.batch.id, self._results.folder)
            await self._save(status=status, ended_ms=now_ms(), problems=[problem])

    async def _beat(self) -> None:
        """Renew the batch's lease and counts, and notice its cancellation. Raises Lost."""
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
                FAILED.note("batches", error, self.batch.id)
                if asyncio.get_running_loop().time() > deadline:
                    raise Lost from error

    def _cancel(self, cancelled_ms: int) -> None:
        self.batch = msgspec.structs.replace(self.batch, cancelling_ms=cancelled_ms)
        self._is_stopped.set()

    # ------------------------------------------------------------ stages

    async def _work(self) -> None:
        """Continue the batch from its current state to its end."""
        if self._has_files:
            await self._finish()
            return
        source = await self._bus.files.get(self.batch.input_file, self.batch.tenant)
        if source is None:
            await self._fail("file_not_found", "the input file was deleted, or has expired")
            return
        chunks = self._means.files.read(source)
        try:
            endpoint, most = self.batch.endpoint, self._settings.max_body_bytes
            found = await read_lines(chunks, endpoint, most, self._means.checks, self.batch.tenant)
        except NotFound as error:
            # A deletion removes the record right after the bytes. If only the bytes are missing, the folder may not be
            # mounted, which is temporary: no batch fails at once because of it.
            raise Unavailable(f"the storage lacks the input file: {error.message}") from error
        if found.problems:
            await self._save(status="failed", problems=found.problems, ended_ms=now_ms())
            return
        self._found = found
        await self._results.load()
        self._num_done = self._results.num_written
        with self._within_limits():
            await self._hold(self._results.file_bytes)
        begun_ms = self.batch.in_progress_ms or now_ms()
        await self._save(status="in_progress", in_progress_ms=begun_ms, total=len(found.lines), model=found.model)
        if self._no_room is None:
            end = self.batch.end or await self._run_lines(found, source)
        else:
            end = self.batch.end or ("cancelled" if self.batch.cancelling_ms else "completed")
        await self._flush()
        # The end is recorded, so that a gateway that repeats it writes the same answers and failures. Without space
        # for them it is not: the lines are then run again, as far as the space suffices.
        noted = "" if end == "completed" or self._no_room is not None else end
        await self._save(status="finalizing", finalizing_ms=self.batch.finalizing_ms or now_ms(), end=noted)
        await self._give_up(found, source, end)
        await self._flush()
        await self._end("failed" if end == "completed" and self._no_room is not None else end)

    async def _run_lines(self, found: InputLines, source: m.File) -> End:
        """Run the lines without answers, a few at a time. Return how the batch ends."""
        caller = await self._caller()
        todo = await found.in_order(self._results.tally.done)
        stopped = asyncio.create_task(self._is_stopped.wait())
        running: set[asyncio.Task[Any]] = {stopped}
        end: End = "completed"
        life = asyncio.timeout(max(0.0, (self.batch.expires_ms - now_ms()) / 1000))
        try:
            async with life:
                for line in todo:
                    running.add(asyncio.create_task(self._run_line(line, source, caller)))
                    await _wait(running, stopped, self._num_calls())
                    if stopped.done():
                        break
                await _wait(running, stopped, 1)
            if stopped.done() and self.batch.cancelling_ms:
                end = "cancelled"
        except TimeoutError:
            if not life.expired():
                raise
            end = "expired"
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if end != "completed" or self._no_room is not None:
            await self._end_requests(found.lines, caller)
        return end

    async def _end(self, status: m.BatchStatus, problems: Sequence[m.BatchProblem] = ()) -> None:
        """Write the output files, then end the batch. Raises Unavailable if stored answers have disappeared."""
        if self._no_room is not None:
            problems = [*problems, self._no_room]
            await self._count_anew()  # discard unwritten answers
        self._results.num_read = 0
        output, errors = await self._write("output"), await self._write("error")
        if self._results.num_read != self._results.num_written:
            text = f"the storage has {self._results.num_read} of {self._results.num_written} answers"
            raise Unavailable(text)
        end = status if status in ("expired", "cancelled") else ""
        await self._save(status="finalizing", end=end, output_file=output, error_file=errors, problems=list(problems))
        await self._finish()

    @property
    def _has_files(self) -> bool:
        """Whether the output files are complete. Parts of them may be gone already, so none is written again."""
        return bool(self.batch.output_file or self.batch.error_file)

    async def _finish(self) -> None:
        """Delete the parts of the output files, then record the end. If this fails, it is repeated."""
        await self._results.forget()
        await self._end_with_files()

    async def _end_with_files(self) -> None:
        status = self.batch.end or ("failed" if self.batch.problems else "completed")
        await self._save(status=status, ended_ms=now_ms())

    async def _write(self, kind: Kind) -> str:
        """Write an output file. Return its id, "" if it would be empty."""
        batch = self.batch
        file_id = self._file_id(kind)
        if await self._bus.files.get(file_id, batch.tenant) is not None:  # from an interrupted try
            await self._save()  # raises Lost: it may also be from the gateway that took over while this one was paused
            await self._bus.files.forget(file_id, batch.tenant)
        life_s = float(batch.output_life_s or self._settings.file_ttl_s)
        made = await self._means.files.make(
            file_id, batch.tenant, f"{batch.id}_{kind}.jsonl", self._results.file(kind), life_s
        )
        return made.id if made is not None else ""

    def _file_id(self, kind: Kind) -> str:
        return f"file-{self.batch.id.removeprefix('batch_')}-{kind}"

    async def _hold(self, file_bytes: Mapping[Kind, int]) -> None:
        """Reserve space for the two files in the tenant's quota. Raises Overloaded if it is exhausted."""
        until_ms = max(now_ms(), self.batch.expires_ms) + int(HELD_S * 1000)
        for kind in KINDS:
            num_bytes = file_bytes.get(kind, 0)
            if num_bytes or kind == "output":
                await self._means.files.hold_output(self._file_id(kind), self.batch.tenant, num_bytes, until_ms)

    @contextmanager
    def _within_limits(self) -> Generator[None]:
        """If the tenant reaches its limit of files or bytes in the block, end the batch with the answers so far."""
        try:
            yield
        except Overloaded as error:
            self._no_room = m.BatchProblem(code="file_limit", message=error.message)
            self._is_stopped.set()

    async def _count_anew(self) -> None:
        """Count only the answers that have been written."""
        self._results = Results(self._means.storage, self.batch.id, self._epoch)
        await self._results.load()

    async def _give_up(self, found: InputLines, source: m.File, end: End) -> None:
        """Record for every unanswered line why it has no answer."""
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
            call = await self._read(line, source)
            await self._take(failure_of(line.number, call.custom_id, code, why))

    async def _fail(self, code: str, message: str) -> None:
        """End the batch because its input is missing, with the answers so far."""
        await self._results.load()
        await self._end("failed", problems=[m.BatchProblem(code=code, message=message)])

    # ------------------------------------------------------------ lines

    async def _run_line(self, line: BatchLine, source: m.File, caller: Caller) -> None:
        """Call the endpoint for one line until it is not too busy to answer.

        Between tries a large body is dropped and read again, because only calls are charged for their memory.
        """
        call = await self._read(line, source)
        begin = line.start + call.begin
        end = begin + len(call.body)
        answer: LineAnswer | None = None
        num_away = 0
        while True:
            try:
                answer, pause_s = await self._ask(line, call, caller)
            except BaseException as error:
                if not is_failure(error):
                    raise
                FAILED.note("batch lines", error, self._key(line))
                num_away += 1
                pause_s = self._means.pace.retry.pause_s(num_away)
                if not is_queue_away(error):
                    why = error.message if isinstance(error, LorafleetError) else "the gateway failed while answering"
                    answer = failure_of(line.number, call.custom_id, "internal_error", why)
            is_large = len(call.body) > SMALL_BODY_BYTES
            if is_large:  # freed in a thread: returning its pages to the system takes a millisecond
                held, call = [call], replace(call, body=b"")
                await asyncio.to_thread(held.clear)
            if answer is not None:
                break
            await asyncio.sleep(pause_s * random.uniform(1.0, 1.5))
            if is_large:
                async with turn_of(end - begin, self._means.turns, self.batch.tenant):
                    call = replace(call, body=await self._bytes(source, begin, end, lambda raw: raw))
        await self._take(answer)

    async def _ask(self, line: BatchLine, call: LineCall, caller: Caller) -> tuple[LineAnswer | None, float]:
        """Return the endpoint's answer; None if it is too busy, with the seconds to wait before a retry.

        Raises errors that the line may cause, and connection errors.
        """
        if call.refusal:
            return failure_of(line.number, call.custom_id, "invalid_request", call.refusal), 0.0
        answer = await self._means.calls.post(self.batch.endpoint, call.body, caller, self._key(line))
        if answer.status in RETRIED:
            return None, answer.retry_after_s
        request_id = answer.headers.get("x-request-id", "")
        made = partial(answer_of, line.number, call.custom_id, answer.status, request_id, answer.body)
        return await self._apart(len(answer.body), made), 0.0

    async def _take(self, answer: LineAnswer) -> None:
        """Buffer a line's answer, and write the buffer if it is full."""
        self._results.add(answer)
        if self._results.is_full:
            await self._flush()

    async def _read(self, line: BatchLine, source: m.File) -> LineCall:
        """Return a line's call."""
        async with turn_of(line.num_bytes, self._means.turns, self.batch.tenant):
            return await self._bytes(source, line.start, line.end, partial(call_of, line))

    async def _bytes(self, source: m.File, start: int, end: int, make: Callable[[bytes], T]) -> T:
        """Return the result of a function applied to a range of a file."""
        chunks = [chunk async for chunk in self._means.files.read(source, start, end)]
        return await self._apart(end - start, lambda: make(b"".join(chunks)))

    async def _apart(self, num_bytes: int, make: Callable[[], T]) -> T:
        """Return `make()`, which processes `num_bytes` bytes: if they are many, in a thread in the tenant's turn."""
        return make() if num_bytes <= PLAIN_BYTES else await self._means.checks.in_thread(make, self.batch.tenant)

    def _key(self, line: BatchLine) -> str:
        return f"{self.batch.id}:{line.number}"

    async def _caller(self) -> Caller:
        """Return the caller on whose behalf the lines run."""
        keys = self._settings.api_keys
        tenant = await self._bus.api_keys.tenant(self.batch.tenant) if keys else None
        return Caller(tenant, ("infer",), until_ms=self.batch.expires_ms)

    async def _end_requests(self, lines: Sequence[BatchLine], caller: Caller) -> None:
        """Cancel running requests of lines whose answers are no longer awaited."""
        open_lines = [line for line in lines if line.number not in self._results.tally.done]
        for some in _slices(open_lines, 256):
            keys = [self._bus.keys.idem(caller.owner, self._key(line)) for line in some]
            for record in await self._bus.get_many(keys, m.Idempotent):
                for rid in record.rids if record is not None else ():
                    with suppress(*CONNECTION_ERRORS):  # otherwise it ends at its deadline
                        await self._bus.cancel(rid)

    # ------------------------------------------------------------ storage

    async def _flush(self) -> None:
        """Write buffered answers, if the tenant's quota allows, then delete their requests from the queue."""
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
        if self._has_files or not self._results.is_loaded:
            return self.batch
        tally = self._results.tally
        return msgspec.structs.replace(self.batch, completed=tally.completed, failed=tally.failed, usage=tally.usage)

    async def _save(self, **changes: object) -> None:
        """Write the batch's progress. Raises Lost."""
        self.batch = msgspec.structs.replace(self._counted(), **changes)
        self._tries, self._num_done = self.tries, self._results.num_written if self._num_done >= 0 else -1
        if not await self._bus.batches.save(self.batch, self._epoch, tries=self._tries):
            raise Lost


async def _wait(running: set[asyncio.Task[Any]], stopped: asyncio.Task[Any], num: int) -> None:
    """Wait until fewer than `num` other tasks run, or until `stopped` is done. Raises a task's error."""
    while len(running) > num and not stopped.done():
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        running -= done - {stopped}
        for task in done:
            task.result()


def _slices(values: Sequence[T], num: int) -> Iterator[Sequence[T]]:
    """Yield a list in parts of `num`."""
    return (values[i : i + num] for i in range(0, len(values), num))
