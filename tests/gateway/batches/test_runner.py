"""A batch whose gateway dies, freezes or drains: another gateway continues it, and each line has one answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
from helpers.waiting import wait_until

from gateway.auth.callers import Caller
from gateway.batches.inner_calls import CallAnswer, InnerCalls
from gateway.batches.run import BatchMeans, BatchPace
from gateway.batches.runner import BatchRunner
from gateway.files.files import FileService
from gateway.files.storage import FolderStorage
from gateway.overload.large import Checks
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.backoff import Backoff
from protocol.runtime.free_space import size_of
from protocol.runtime.guarded import guarded
from protocol.runtime.settings import Settings
from protocol.wire import messages as m

PACE = BatchPace(poll_s=0.02, lease_s=0.4, beat_s=0.05)
FROZEN = BatchPace(poll_s=0.02, lease_s=0.4, beat_s=1000)
NUM_LINES = 40


@dataclass
class Endpoint(InnerCalls):
    """Answers lines at once, except those that `holds` selects."""

    answer: Callable[[int], CallAnswer] = lambda number: CallAnswer(200, {}, b'{"n":%d}' % number)
    holds: Callable[[int], bool] = lambda number: False
    asked: list[int] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def post(self, path: str, body: bytes, caller: Caller, key: str) -> CallAnswer:
        number = orjson.loads(body)["n"]
        self.asked.append(number)
        if self.holds(number):
            await self.go.wait()
        return self.answer(number)


@dataclass
class World:
    """The storage and the records that gateways share."""

    bus: Bus
    root: Path
    limits: dict[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return Settings(redis_url=self.bus.url, model="any", **self.limits)  # type: ignore[arg-type]

    @property
    def storage(self) -> FolderStorage:
        return FolderStorage(self.root)

    @property
    def files(self) -> FileService:
        return FileService(self.bus, self.storage, self.settings)

    async def batch(self, num: int = NUM_LINES, life_ms: int = 3_600_000) -> m.Batch:
        """Create a batch of `num` lines, numbered from 1."""

        async def chunks() -> AsyncIterator[bytes]:
            for n in range(1, num + 1):
                yield json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/x", "body": {"n": n}}).encode()
                yield b"\n"

        source = await self.files.make("file-in", "t", "in.jsonl", chunks(), 600)
        assert source is not None
        batch = m.Batch(
            id="batch_1", tenant="t", endpoint="/v1/x", input_file=source.id, created_ms=now_ms(),
            expires_ms=now_ms() + life_ms,
        )  # fmt: skip
        assert await self.bus.batches.open(batch, ttl_ms=600_000, max_open=1) == -1
        return batch

    @asynccontextmanager
    async def gateway(self, gid: str, calls: Endpoint, pace: BatchPace = PACE) -> AsyncIterator[asyncio.Task[None]]:
        means = BatchMeans(self.bus, gid, self.files, self.storage, self.settings, calls, Checks(), pace)
        runner = BatchRunner(means, asyncio.Event())
        task = asyncio.create_task(guarded(replace(runner.loop(), backoff=Backoff(0.01, 0.05))))
        try:
            yield task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await runner.leave()

    async def ended(self) -> m.Batch:
        async def look() -> m.Batch | None:
            batch = await self.bus.batches.get("batch_1", "t")
            assert batch is not None
            return batch if batch.status in m.ENDED_BATCH else None

        return await wait_until(look, "the batch has ended")

    async def answered(self, num: int) -> None:
        """Wait until the record of the batch counts `num` answers, which are then stored."""

        async def look() -> bool:
            batch = await self.bus.batches.get("batch_1", "t")
            return batch is not None and batch.completed == num

        await wait_until(look, f"{num} lines are answered")

    async def rows(self, file_id: str) -> dict[str, dict[str, object]]:
        """Return the rows of an output file by custom_id, which must be unique."""
        file = await self.bus.files.get(file_id, "t")
        assert file is not None
        text = b"".join([chunk async for chunk in self.files.read(file)])
        assert len(text) == file.num_bytes
        rows = [json.loads(row) for row in text.splitlines()]
        found = {row["custom_id"]: row for row in rows}
        assert len(found) == len(rows)
        return found


async def test_a_frozen_gateway_is_replaced_and_writes_nothing_more(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    await world.batch()
    frozen, other = Endpoint(holds=lambda number: number > 10), Endpoint()
    async with world.gateway("g1", frozen, FROZEN):
        await wait_until(lambda: len(frozen.asked) > 10, "the first gateway waits for answers")
        async with world.gateway("g2", other):
            batch = await world.ended()
            assert (batch.status, batch.total, batch.completed, batch.failed) == ("completed", NUM_LINES, NUM_LINES, 0)
            frozen.go.set()
            await wait_until(lambda: len(frozen.asked) == NUM_LINES, "the first gateway goes on")
        assert (await world.ended()) == batch
    assert (await world.rows(batch.output_file)).keys() == {f"c{n}" for n in range(1, NUM_LINES + 1)}


async def test_a_draining_gateway_leaves_its_answers_to_the_next(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    await world.batch()
    first, other = Endpoint(holds=lambda number: number > 10), Endpoint()
    async with world.gateway("g1", first):
        await world.answered(10)
    async with world.gateway("g2", other):
        batch = await world.ended()
    assert batch.completed == NUM_LINES
    assert sorted(other.asked) == list(range(11, NUM_LINES + 1))
    assert len(await world.rows(batch.output_file)) == NUM_LINES


async def test_a_busy_fleet_is_asked_again(bus: Bus, tmp_path: Path) -> None:
    world, seen = World(bus, tmp_path), set[int]()

    def answer(number: int) -> CallAnswer:
        if number in seen:
            return CallAnswer(200, {}, b"{}")
        seen.add(number)
        return CallAnswer((429, 503)[number % 2], {"retry-after": "0"}, b'{"error":{}}')

    await world.batch(6)
    async with world.gateway("g1", Endpoint(answer)):
        batch = await world.ended()
    assert (batch.completed, batch.failed) == (6, 0)


async def test_what_is_not_answered_in_time_has_expired(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    await world.batch(6, life_ms=700)
    async with world.gateway("g1", Endpoint(holds=lambda number: number % 2 == 0)):
        batch = await world.ended()
    assert (batch.status, batch.completed, batch.failed) == ("expired", 3, 3)
    assert (await world.rows(batch.output_file)).keys() == {"c1", "c3", "c5"}
    assert {row["error"]["code"] for row in (await world.rows(batch.error_file)).values()} == {"batch_expired"}  # type: ignore[index]


async def test_an_input_that_is_deleted_meanwhile_fails_the_batch(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    batch = await world.batch()
    first = Endpoint(holds=lambda number: number > 10)
    async with world.gateway("g1", first):
        await world.answered(10)
    await world.bus.files.forget(batch.input_file, "t")
    async with world.gateway("g2", Endpoint()):
        batch = await world.ended()
    assert batch.status == "failed"
    assert [problem.code for problem in batch.problems] == ["file_not_found"]
    assert len(await world.rows(batch.output_file)) == 10


async def test_usage_is_the_sum_of_all_answers(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    await world.batch(5)
    async with world.gateway("g1", Endpoint(lambda number: CallAnswer(200, {}, orjson.dumps({"usage": usage})))):
        batch = await world.ended()
    assert batch.usage == m.BatchUsage(input_tokens=15, cached_tokens=5, output_tokens=10)


class StuckStorage(FolderStorage):
    """Never deletes the answers of a batch."""

    deleting = asyncio.Event()

    async def delete(self, name: str) -> None:
        if name.startswith("batches/"):
            self.deleting.set()
            await asyncio.Event().wait()
        await super().delete(name)


class StuckWorld(World):
    @property
    def storage(self) -> FolderStorage:
        return StuckStorage(self.root)


async def test_the_parts_are_deleted_though_the_gateway_ends_meanwhile(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    await world.batch(5)
    StuckStorage.deleting.clear()
    async with StuckWorld(bus, tmp_path).gateway("g1", Endpoint()):
        await StuckStorage.deleting.wait()
    later = Endpoint()
    async with world.gateway("g2", later):
        batch = await world.ended()
        assert size_of(tmp_path) == (await sizes(world))["sum"]
    assert (batch.status, batch.completed, later.asked) == ("completed", 5, [])
    assert len(await world.rows(batch.output_file)) == 5


async def sizes(world: World) -> dict[str, int]:
    """Return the counted and reserved sizes of the tenant's files."""
    found = await world.bus._redis.hgetall(world.bus.keys.file_sizes("t"))  # type: ignore[misc]
    return {name.decode(): int(size) for name, size in found.items()}


async def test_answers_beyond_the_tenants_bytes_end_the_batch(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path, {"tenant_file_bytes": 60_000})
    await world.batch()
    large = CallAnswer(200, {}, b'{"n":"%s"}' % (b"x" * 5000))
    async with world.gateway("g1", Endpoint(lambda number: large)):
        batch = await world.ended()
        found = await sizes(world)
        await wait_until(lambda: size_of(tmp_path) == found["sum"], "the batch's parts are deleted")
    assert (batch.status, [problem.code for problem in batch.problems]) == ("failed", ["file_limit"])
    assert "the limit is 60000" in batch.problems[0].message
    kept = await world.rows(batch.output_file) if batch.output_file else {}
    assert (batch.completed, batch.failed) == (len(kept), 0)
    assert found["sum"] <= 60_000
    assert found.keys() == {"sum", "file-in", *filter(None, [batch.output_file])}


async def test_answers_that_fit_are_kept_when_others_do_not(bus: Bus, tmp_path: Path) -> None:
    """Also those of another gateway; no line is counted unless its answer is in a file."""
    world = World(bus, tmp_path, {"tenant_file_bytes": 60_000})
    await world.batch()
    small, large = CallAnswer(200, {}, b"{}"), CallAnswer(200, {}, b'{"n":"%s"}' % (b"x" * 9000))
    first = Endpoint(lambda number: small, holds=lambda number: number > 10)
    async with world.gateway("g1", first):
        await world.answered(10)
    async with world.gateway("g2", Endpoint(lambda number: small if number <= 10 else large)):
        batch = await world.ended()
    assert (batch.status, [problem.code for problem in batch.problems]) == ("failed", ["file_limit"])
    kept = await world.rows(batch.output_file)
    assert kept.keys() >= {f"c{number}" for number in range(1, 11)}
    assert batch.completed == len(kept) < NUM_LINES
    assert (await sizes(world))["sum"] <= 60_000


async def test_a_tenant_with_all_its_files_gets_no_batch_computed(bus: Bus, tmp_path: Path) -> None:
    world, endpoint = World(bus, tmp_path, {"tenant_files": 1}), Endpoint()
    await world.batch()
    async with world.gateway("g1", endpoint):
        batch = await world.ended()
    assert (batch.status, [problem.code for problem in batch.problems]) == ("failed", ["file_limit"])
    assert batch.problems[0].message.startswith("you have 1 files; the limit is 1")
    assert (endpoint.asked, batch.output_file, batch.error_file) == ([], "", "")
    assert (await sizes(world)).keys() == {"sum", "file-in"}


async def test_failures_of_lines_count_as_well(bus: Bus, tmp_path: Path) -> None:
    """Expired lines fill an error file, which is cut at the tenant's limit."""
    world = World(bus, tmp_path, {"tenant_file_bytes": 8_000})
    await world.batch(life_ms=500)
    async with world.gateway("g1", Endpoint(holds=lambda number: True)):
        batch = await world.ended()
    assert (batch.status, [problem.code for problem in batch.problems]) == ("expired", ["file_limit"])
    assert (await sizes(world))["sum"] <= 8_000
    assert (batch.completed, batch.failed) == (0, len(await world.rows(batch.error_file)) if batch.error_file else 0)


async def test_what_a_batch_holds_is_given_back_at_its_end(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path, {"tenant_files": 3})
    await world.batch()
    refused = CallAnswer(400, {}, b"{}")
    async with world.gateway("g1", Endpoint(lambda number: refused)):
        batch = await world.ended()
    assert (batch.status, batch.failed, batch.output_file) == ("completed", NUM_LINES, "")
    assert (await sizes(world)).keys() == {"sum", "file-in", batch.error_file}
