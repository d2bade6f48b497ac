"""The answers of a batch are stored in parts; a later run adds more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.batches.results import Results, answer_of
from gateway.batches.run import BatchMeans, BatchRun, Lost
from gateway.files.storage import FolderStorage
from gateway.overload.large import Checks
from protocol.queue.bus import Bus
from protocol.wire.errors import Unavailable
from tests.gateway.batches.test_runner import Endpoint, World
from tests.gateway.batches.test_trouble import SOON, shaky_world


async def written(results: Results) -> list[bytes]:
    return b"".join([chunk async for chunk in results.file("output")]).splitlines()


async def test_a_gateway_that_takes_its_batch_up_again_keeps_its_answers(tmp_path: Path) -> None:
    """After an error of the queue, it runs the batch under the same epoch: no part may be replaced."""
    storage = FolderStorage(tmp_path)
    first = Results(storage, "b", 1)
    await first.load()
    first.add(answer_of(0, "zero", 200, "r0", b"{}"))
    assert await first.flush() == [0]
    again = Results(storage, "b", 1)
    await again.load()
    again.add(answer_of(1, "one", 200, "r1", b"{}"))
    assert await again.flush() == [1]
    assert [b'"zero"' in line for line in await written(again)] == [True, False]
    assert (again.tally.completed, len(await written(again))) == (2, 2)


class SlowStorage(FolderStorage):
    """A folder in which nothing is written before `may_write` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.is_asked = asyncio.Event()
        self.may_write = asyncio.Event()

    async def write(self, name: str, chunks: AsyncIterator[bytes | bytearray]) -> int:
        self.is_asked.set()
        await self.may_write.wait()
        return await super().write(name, chunks)


async def test_who_flushes_beside_another_waits_for_what_that_one_writes(tmp_path: Path) -> None:
    storage = SlowStorage(tmp_path)
    results = Results(storage, "batch_1", 1)
    results.add(answer_of(0, "c0", 200, "", b"{}"))
    first = asyncio.create_task(results.flush())
    await storage.is_asked.wait()
    second = asyncio.create_task(results.flush())
    await asyncio.sleep(0)  # so that the second flush starts
    await asyncio.sleep(0)
    assert not second.done()  # otherwise, an output file could be made without the answer
    storage.may_write.set()
    assert (await first, await second) == ([0], [])
    assert [b'"custom_id":"c0"' in line for line in await written(results)] == [True]


@pytest.mark.parametrize("num_refused", [2, 1000])
async def test_a_deletion_of_parts_that_fails_is_tried_again(
    bus: Bus, tmp_path: Path, num_refused: int, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """After the last try the batch ends with its answers, and the log names the folder that is left."""

    def fails(method: str, name: str) -> BaseException | None:
        is_refused = method == "delete" and world.shaky.asked["delete"] <= num_refused
        return Unavailable("503 SlowDown") if is_refused and name == "batches/batch_1" else None

    world = shaky_world(bus, tmp_path, fails)
    await world.batch(5)
    async with world.gateway("g1", Endpoint(), SOON):
        batch = await world.ended()
    assert (batch.status, batch.completed, batch.problems) == ("completed", 5, [])
    assert len(await world.rows(batch.output_file)) == 5
    is_left = num_refused > SOON.max_tries
    assert (tmp_path / "batches" / "batch_1").exists() == is_left
    assert ("of batch batch_1 remain in the storage, in batches/batch_1" in caplog.text) == is_left


async def test_a_gateway_that_was_paused_leaves_its_successor_s_file(bus: Bus, tmp_path: Path) -> None:
    """It deleted the file's record and was then told that it has lost the batch: a completed batch without a file."""
    world = World(bus, tmp_path)
    batch = await world.batch(3)
    claimed = await bus.batches.claim(batch.id, "t", "g1", 1)
    assert claimed is not None
    async with world.gateway("g2", Endpoint()):
        ended = await world.ended()
    means = BatchMeans(bus, "g1", world.files, world.storage, world.settings, Endpoint(), Checks())
    with pytest.raises(Lost):
        await BatchRun(means, claimed, lambda: 1)._write("output")
    assert len(await world.rows(ended.output_file)) == 3
