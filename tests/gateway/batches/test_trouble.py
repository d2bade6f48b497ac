"""Failures of lines, of the storage, and of each step while a batch runs: it ends once, and others continue."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import examples
from helpers.waiting import wait_until
from prometheus_client import REGISTRY

from gateway.batches.inner_calls import CallAnswer
from gateway.batches.run import BatchPace
from gateway.files.storage import FolderStorage
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.backoff import Backoff
from protocol.wire import messages as m
from protocol.wire.errors import NotFound, Unavailable
from tests.gateway.batches.test_runner import PACE, Endpoint, World

SOON = replace(PACE, retry=Backoff(0.01, 0.02), max_tries=4)


class PanicException(BaseException):
    """Equivalent of a panic in a Rust library."""


class Shaky(FolderStorage):
    """A storage whose methods fail when `fails` returns an error."""

    def __init__(self, root: Path, fails: Callable[[str, str], BaseException | None]) -> None:
        super().__init__(root)
        self.fails = fails
        self.asked: Counter[str] = Counter()

    def _check(self, method: str, name: str) -> None:
        self.asked[method] += 1
        if (error := self.fails(method, name)) is not None:
            raise error

    async def write(self, name: str, chunks: AsyncIterator[bytes | bytearray]) -> int:
        self._check("write", name)
        return await super().write(name, chunks)

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        self._check("read", name)
        async for chunk in super().read(name, start, end):
            yield chunk

    async def names(self, prefix: str) -> list[str]:
        self._check("names", prefix)
        return await super().names(prefix)

    async def delete(self, name: str) -> None:
        self._check("delete", name)
        await super().delete(name)


class ShakyWorld(World):
    """Gateways that share a storage that may fail."""

    shaky: Shaky

    @property
    def storage(self) -> FolderStorage:
        return self.shaky


def shaky_world(bus: Bus, root: Path, fails: Callable[[str, str], BaseException | None]) -> ShakyWorld:
    world = ShakyWorld(bus, root)
    world.shaky = Shaky(root, fails)
    return world


def count_of(name: str, loop: str) -> float:
    return REGISTRY.get_sample_value(f"lorafleet_{name}_total", {"loop": loop}) or 0.0


async def batch_of(world: World, bodies: list[dict[str, Any]], id_: str = "1", tenant: str = "t") -> m.Batch:
    """Create a batch of lines with these bodies."""
    shown = [{"custom_id": f"c{n}", "method": "POST", "url": "/v1/x", "body": body} for n, body in enumerate(bodies, 1)]
    return await batch_of_lines(world, [json.dumps(line).encode() for line in shown], id_, tenant)


async def batch_of_lines(world: World, lines: list[bytes], id_: str = "1", tenant: str = "t") -> m.Batch:
    async def chunks() -> AsyncIterator[bytes]:
        for line in lines:
            yield line + b"\n"

    source = await world.files.make(f"file-in{id_}", tenant, "in.jsonl", chunks(), 600)
    assert source is not None
    batch = m.Batch(
        id=f"batch_{id_}", tenant=tenant, endpoint="/v1/x", input_file=source.id, created_ms=now_ms(),
        expires_ms=now_ms() + 3_600_000,
    )  # fmt: skip
    assert await world.bus.batches.open(batch, ttl_ms=600_000, max_open=100) == -1
    return batch


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


async def test_a_line_nested_deeper_than_can_be_written_fails_alone(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    deep = [{"n": n, "metadata": nested(depth)} for n, depth in enumerate((1, 254, 300, 900), 1)]
    await batch_of(world, [*deep, {"n": 5}])
    endpoint = Endpoint()
    async with world.gateway("g1", endpoint):
        batch = await world.ended()
    assert batch.status == "completed"
    assert batch.completed + batch.failed == 5
    assert {"c1", "c5"} <= (await world.rows(batch.output_file)).keys()
    assert len(endpoint.asked) == len(set(endpoint.asked)), "nothing is asked twice"


async def test_a_line_that_is_no_text_fails_alone(bus: Bus, tmp_path: Path) -> None:
    """The first look at a file skips the invalid value; the run reads it."""
    world = World(bus, tmp_path)
    shown = [b'{"n":1}', b'{"n":2,"model":"\xff"}', b'{"n":3,"stream":1e999}', b'{"n":4,"prompt":["\xff"]}', b'{"n":5}']
    await batch_of_lines(world, [
        b'{"custom_id":"c%d","method":"POST","url":"/v1/x","body":%b}' % one for one in enumerate(shown, 1)
    ])  # fmt: skip
    async with world.gateway("g1", Endpoint(), SOON):
        batch = await world.ended()
    assert (batch.status, batch.completed, batch.failed) == ("completed", 2, 3)
    assert (await world.rows(batch.output_file)).keys() == {"c1", "c5"}


RAISED = (ValueError("bug"), RecursionError(), MemoryError(), PanicException("panic"), TimeoutError(), KeyError(1))


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
async def test_whatever_a_line_raises_is_that_line_s_failure(bus: Bus, tmp_path: Path, error: BaseException) -> None:
    world, raised = World(bus, tmp_path), 0

    def answer(number: int) -> CallAnswer:
        nonlocal raised
        if number % 3 == 0 and (raised < 4 or not isinstance(error, TimeoutError)):
            raised += 1
            raise error
        return CallAnswer(200, {}, b"{}")

    before = count_of("loop_failures", "batch lines")
    await world.batch(9)
    async with world.gateway("g1", Endpoint(answer), SOON):
        batch = await world.ended()
    passes = isinstance(error, TimeoutError)  # like a queue that is unreachable: only the line is retried
    assert (batch.status, batch.completed, batch.failed) == ("completed", 9 if passes else 6, 0 if passes else 3)
    assert count_of("loop_failures", "batch lines") - before == (4 if passes else 3)
    if not passes:
        rows = await world.rows(batch.error_file)
        assert rows.keys() == {"c3", "c6", "c9"}
        assert {row["error"]["code"] for row in rows.values()} == {"internal_error"}  # type: ignore[index]


async def test_an_answer_that_is_no_json_fails_its_line_alone(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    await world.batch(4)
    async with world.gateway("g1", Endpoint(lambda n: CallAnswer(200, {}, b"{" if n == 2 else b"{}"))):
        batch = await world.ended()
    assert (batch.status, batch.completed, batch.failed) == ("completed", 3, 1)


async def test_a_storage_that_is_down_for_a_while_loses_and_doubles_nothing(bus: Bus, tmp_path: Path) -> None:
    """It is down half of the time; stored answers are kept, and each line has one answer."""
    num = 0

    def fails(method: str, name: str) -> BaseException | None:
        nonlocal num
        num += 1
        return Unavailable("the storage is down") if num // 40 % 2 and not name.startswith("files/file-in") else None

    world = shaky_world(bus, tmp_path, fails)
    await world.batch(30)
    async with world.gateway("g1", Endpoint(), replace(SOON, max_tries=1000)):
        batch = await world.ended()
    assert (batch.status, batch.completed, batch.failed) == ("completed", 30, 0)
    assert len(await World(bus, tmp_path).rows(batch.output_file)) == 30


async def test_answers_that_were_not_written_yet_are_asked_again(bus: Bus, tmp_path: Path) -> None:
    """The storage fails after the last lines are answered, before they are written; all of them are answered again."""
    is_away = False

    def fails(method: str, name: str) -> BaseException | None:
        return Unavailable("away") if is_away and method == "write" else None

    def answer(number: int) -> CallAnswer:
        nonlocal is_away
        is_away = number == 10 and endpoint.asked.count(10) == 1
        return CallAnswer(200, {}, b"{}")

    world = shaky_world(bus, tmp_path, fails)
    await world.batch(10)
    endpoint = Endpoint(answer)
    async with world.gateway(
        "g1", endpoint, replace(SOON, lease_s=1000, min_calls=1, calls_per_slot=0, max_tries=1000)
    ):
        await wait_until(lambda: 10 in endpoint.asked, "the last line is asked")
        await wait_until(lambda: world.shaky.asked["write"] > 3, "it is tried to write the answers")
        is_away = False
        batch = await world.ended()
    assert (batch.status, batch.completed, batch.failed) == ("completed", 10, 0)
    assert len(await World(bus, tmp_path).rows(batch.output_file)) == 10


async def test_a_storage_that_has_lost_sight_of_answers_ends_no_batch(bus: Bus, tmp_path: Path) -> None:
    """As when a folder is not mounted and so looks empty while the output file is made."""
    num_empty = 0

    class Empty(FolderStorage):
        async def names(self, prefix: str) -> list[str]:
            nonlocal num_empty
            found = await super().names(prefix)
            if found and num_empty < 2:
                num_empty += 1
                return []
            return found

    world = ShakyWorld(bus, tmp_path)
    world.shaky = Empty(tmp_path)  # type: ignore[assignment]
    await World(bus, tmp_path).batch(10)
    async with world.gateway("g1", Endpoint(), SOON):
        batch = await world.ended()
    assert (batch.status, batch.completed, batch.failed) == ("completed", 10, 0)
    assert num_empty == 2
    assert len(await World(bus, tmp_path).rows(batch.output_file)) == 10


async def test_an_input_that_is_out_of_sight_for_a_while_ends_no_batch(bus: Bus, tmp_path: Path) -> None:
    """As when a folder is not mounted, or a different one is: the record says that the file exists."""
    num = 0

    def fails(method: str, name: str) -> BaseException | None:
        nonlocal num
        num += method == "read" and name == "files/file-in"
        return NotFound("the content of this file no longer exists") if num in (1, 2, 7, 8, 15) else None

    world = shaky_world(bus, tmp_path, fails)
    await world.batch(10)
    async with world.gateway("g1", Endpoint(), replace(SOON, max_tries=1000)):
        batch = await world.ended()
    assert (batch.status, batch.completed, batch.failed, batch.problems) == ("completed", 10, 0, [])
    assert len(await World(bus, tmp_path).rows(batch.output_file)) == 10


async def test_a_batch_without_room_that_is_given_up_was_not_cancelled(bus: Bus, tmp_path: Path) -> None:
    world = shaky_world(
        bus, tmp_path, lambda method, name: Unavailable("down") if name.startswith("files/file-1-") else None
    )  # fmt: skip
    world.limits = {"tenant_file_bytes": 8_000}
    await world.batch(10)
    large = CallAnswer(200, {}, b'{"n":"%s"}' % (b"x" * 5000))
    async with world.gateway("g1", Endpoint(lambda number: large), SOON):
        batch = await world.ended()
    assert (batch.status, batch.cancelling_ms) == ("failed", 0)
    assert batch.problems[0].code == "storage_unavailable"


async def test_a_batch_whose_storage_stays_down_is_tried_so_often(bus: Bus, tmp_path: Path) -> None:
    """The batch's record counts the tries of all gateways; each waits before it reads the file again."""
    is_down = False

    def fails(method: str, name: str) -> BaseException | None:
        return OSError(errno.ENOSPC, "No space left on device") if is_down and method == "write" else None

    world, before = shaky_world(bus, tmp_path, fails), count_of("given_up", "batches")
    await world.batch(10)
    is_down = True
    slow = replace(SOON, retry=Backoff(0.2, 0.2))
    async with world.gateway("g1", Endpoint(), slow), world.gateway("g2", Endpoint(), slow):
        batch = await world.ended()
    assert batch.status == "failed"
    assert [problem.code for problem in batch.problems] == ["internal_error"]
    assert f"after {SOON.max_tries} tries" in batch.problems[0].message
    assert count_of("given_up", "batches") - before == 1
    assert world.shaky.asked["read"] <= SOON.max_tries * (10 + 2), "each try reads the file and each line once"
    assert await bus.batches.waiting(10) == []


async def test_what_was_answered_is_kept_when_a_batch_is_given_up(bus: Bus, tmp_path: Path) -> None:
    """The input cannot be read from the sixth line on: the answers to the first five are kept."""
    reads: Counter[tuple[str, int]] = Counter()
    world = World(bus, tmp_path)
    await world.batch(10)
    source = await bus.files.get("file-in", "t")
    assert source is not None

    class Torn(FolderStorage):
        async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
            if name.endswith("file-in") and end is not None and start > source.num_bytes // 2:
                reads[name, start] += 1
                raise Unavailable("a bad sector")
            async for chunk in super().read(name, start, end):
                yield chunk

    torn = ShakyWorld(bus, tmp_path)
    torn.shaky = Torn(tmp_path)  # type: ignore[assignment]
    async with torn.gateway("g1", Endpoint(), replace(SOON, min_calls=1, calls_per_slot=0)):
        batch = await torn.ended()
    assert batch.status == "failed"
    assert [problem.code for problem in batch.problems] == ["storage_unavailable"]
    assert "a bad sector" in batch.problems[0].message
    assert len(await world.rows(batch.output_file)) == batch.completed > 0
    assert max(reads.values()) <= SOON.max_tries


async def test_a_batch_whose_answers_cannot_be_listed_keeps_its_counts(bus: Bus, tmp_path: Path) -> None:
    world = shaky_world(bus, tmp_path, lambda method, name: Unavailable("away") if method == "names" else None)
    await world.batch(10)
    async with World(bus, tmp_path).gateway("g1", Endpoint(holds=lambda number: number > 5)):
        await world.answered(5)
    async with world.gateway("g2", Endpoint(), SOON):
        batch = await world.ended()
    assert (batch.status, batch.completed) == ("failed", 5)


async def test_a_batch_that_fails_again_and_again_delays_no_other(bus: Bus, tmp_path: Path) -> None:
    world = shaky_world(
        bus, tmp_path, lambda method, name: Unavailable("down") if name == "files/file-inbad" else None
    )  # fmt: skip
    clean = World(bus, tmp_path)
    await batch_of(clean, [{"n": 1}], "bad", "a")
    await batch_of(clean, [{"n": 2}], "1", "t")
    async with world.gateway("g1", Endpoint(), replace(PACE, max_batches=1, retry=Backoff(60, 60))):
        assert (await world.ended()).status == "completed"
        bad = await bus.batches.get("batch_bad", "a")
        assert bad is not None
        assert bad.status == "validating"


STEPS: list[tuple[str, str]] = [
    *(("storage", name) for name in ("write", "read", "names", "delete")),
    *(("batches", name) for name in ("claim", "save", "waiting")),
    *(("files", name) for name in ("get", "keep", "forget")),
    *(("bus", name) for name in ("get_many", "forget_call", "cancel", "finish")),
    ("api_keys", "tenant"), ("members", "worker_beats"),
]  # fmt: skip


@asynccontextmanager
async def failing(bus: Bus, world: ShakyWorld, part: str, name: str, at: int) -> AsyncIterator[Counter[str]]:
    """Let the `at`-th call of a method fail before it does anything, and the next one afterwards."""
    calls: Counter[str] = Counter()
    owner: Any = {"storage": world.shaky, "bus": bus}.get(part) or getattr(bus, part)
    real = getattr(owner, name)

    async def wrapped(*args: Any, **given: Any) -> Any:
        calls[name] += 1
        if calls[name] == at:
            raise RuntimeError(f"{part}.{name} fails")
        found = await real(*args, **given)
        if calls[name] == at + 1:
            raise RuntimeError(f"{part}.{name} fails after it is done")
        return found

    async def read(*args: Any, **given: Any) -> AsyncIterator[bytes]:
        calls[name] += 1
        if calls[name] == at:
            raise RuntimeError(f"{part}.{name} fails")
        async for chunk in real(*args, **given):
            yield chunk

    setattr(owner, name, read if name == "read" else wrapped)
    try:
        yield calls
    finally:
        delattr(owner, name)


@pytest.mark.parametrize("kind", examples.some(["completed", "cancelled", "expired"], "completed"))
async def test_each_step_of_a_batch_may_raise(
    bus: Bus, tmp_path: Path, kind: str, subtests: pytest.Subtests
) -> None:  # fmt: skip
    """However a step fails, on the first or a later call: one end, one answer per line, the other batch completes."""
    number = 0
    for part, name in STEPS:
        for at in (1, 3) if part == "storage" or name in ("save", "keep") else (1,):
            number += 1
            with subtests.test(step=f"{part}.{name}", at=at):
                await one_step(bus, tmp_path / str(number), f"{number}x{kind}", kind, part, name, at)


async def one_step(bus: Bus, root: Path, id_: str, kind: str, part: str, name: str, at: int) -> None:
    world = shaky_world(bus, root, lambda method, name: None)
    clean, bodies = World(bus, root), [{"n": n} for n in range(1, 7)]
    await batch_of(clean, bodies, id_, "a")
    await batch_of(clean, [{"n": 99}], f"{id_}other", "b")
    ends: list[m.Batch] = []
    endpoint = Endpoint(holds=lambda number: kind != "completed" and number in (3, 6))
    pace = replace(SOON, max_tries=1000, lease_s=0.2, beat_s=0.02)
    if kind == "expired":
        batch = await bus.batches.get(f"batch_{id_}", "a")
        claimed = await bus.batches.claim(f"batch_{id_}", "a", "setup", 0)
        assert batch is not None
        assert claimed is not None
        batch = m.Batch(**{**{f: getattr(batch, f) for f in batch.__struct_fields__}, "expires_ms": now_ms() + 150})
        assert await bus.batches.save(batch, claimed.epoch, leaves=True)

    async def end_of(batch_id: str, tenant: str) -> m.Batch:
        async def look() -> m.Batch | None:
            found = await bus.batches.get(batch_id, tenant)
            return found if found is not None and found.status in m.ENDED_BATCH else None

        return await wait_until(look, f"{batch_id} has ended")

    async with failing(bus, world, part, name, at), world.gateway("g1", endpoint, pace):
        if kind == "cancelled":
            await wait_until(lambda: 3 in endpoint.asked, "the batch runs")
            pipe = bus._redis.pipeline()
            pipe.hsetnx(bus.keys.batch(f"batch_{id_}"), "cancel", str(now_ms()))
            await pipe.execute()
        ends.append(await end_of(f"batch_{id_}", "a"))
        other = await end_of(f"batch_{id_}other", "b")
    assert (other.status, other.completed) == ("completed", 1)
    [ended] = ends
    assert ended.status == kind
    assert await bus.batches.get(f"batch_{id_}", "a") == ended, "there is no second end"
    rows: Counter[str] = Counter()
    for file_id, tenant in ((ended.output_file, "a"), (ended.error_file, "a")):
        if file_id:
            file = await bus.files.get(file_id, tenant)
            assert file is not None
            text = b"".join([chunk async for chunk in clean.files.read(file)])
            assert len(text) == file.num_bytes
            rows.update(json.loads(line)["custom_id"] for line in text.splitlines())
    assert rows == Counter(f"c{n}" for n in range(1, 7)), "each line has one answer"
    assert ended.completed + ended.failed == 6


async def test_a_batch_that_ends_its_gateways_is_given_up(bus: Bus, tmp_path: Path) -> None:
    """A gateway that dies reports nothing, so the gateway that takes the batch over counts the try."""
    world = World(bus, tmp_path)
    await world.batch(3)
    for number in range(SOON.max_tries):
        claimed = await bus.batches.claim("batch_1", "t", f"dead{number}", 0)
        assert claimed is not None
        assert claimed.tries == number
    claimed = await bus.batches.claim("batch_1", "t", "alive", 0)
    assert claimed is not None
    assert claimed.tries == SOON.max_tries


async def test_every_tenant_s_first_batch_is_before_anybody_s_second(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    for number in range(80):
        await batch_of(world, [{"n": 1}], f"a{number}", "a")
    for tenant in ("zoe", "bob"):
        await batch_of(world, [{"n": 1}], tenant, tenant)
    found = [tenant for tenant, _ in await bus.batches.waiting(4)]
    assert found[0] == "a"
    assert sorted(found[1:3]) == ["bob", "zoe"] if found[1] != "zoe" else found[1:3] == ["zoe", "bob"]
    assert found[3] == "a"


async def test_one_tenant_cannot_hold_all_places(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    for number in range(12):
        await batch_of(world, [{"n": 1}], f"a{number}", "a")
    endpoint = Endpoint(holds=lambda number: number == 1)
    async with world.gateway("g1", endpoint):
        await wait_until(lambda: len(endpoint.asked) == BatchPace().max_batches_of_tenant, "its share runs")
        await batch_of(world, [{"n": 2}], "1", "t")
        assert (await world.ended()).status == "completed"
        assert endpoint.asked.count(1) == BatchPace().max_batches_of_tenant
        endpoint.go.set()


async def test_a_batch_that_has_waited_for_its_turn_is_claimed_after_it_alone(bus: Bus, tmp_path: Path) -> None:
    world = World(bus, tmp_path)
    batch = await world.batch(1)
    claimed = await bus.batches.claim(batch.id, "t", "g1", 60_000)
    assert claimed is not None
    assert await bus.batches.save(batch, claimed.epoch, leaves=True, wait_ms=60_000, tries=3)
    assert await bus.batches.waiting(10) == []
    assert await bus.batches.claim(batch.id, "t", "g1", 60_000) is None
    assert await bus.batches.claim(batch.id, "t", "g2", 60_000) is None
