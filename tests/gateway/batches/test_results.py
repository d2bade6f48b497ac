"""The answers of a batch, in parts that a later run adds to."""

from __future__ import annotations

from pathlib import Path

from gateway.batches.results import Results, answer_of
from gateway.files.storage import FolderStorage


async def written(results: Results) -> list[bytes]:
    return b"".join([chunk async for chunk in results.file("output")]).splitlines()


async def test_a_gateway_that_takes_its_batch_up_again_keeps_its_answers(tmp_path: Path) -> None:
    """It runs the batch under the same epoch when an error of the queue's has stopped it: no part may be replaced."""
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
