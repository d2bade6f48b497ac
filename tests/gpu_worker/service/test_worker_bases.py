"""The files of added bases, whose paths operators choose, hold up nothing that a worker does."""

from __future__ import annotations

import threading

import pytest
from helpers.waiting import wait_until

from gpu_worker.service import bases
from protocol.queue.bus import Bus
from protocol.wire import messages as m
from tests.gpu_worker.service.fakes import running_worker


async def test_files_that_do_not_answer_silence_no_worker(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network's file system whose server is away."""
    asked, answered = threading.Event(), threading.Event()

    def hang(_: str) -> bool:
        asked.set()
        return answered.wait()

    monkeypatch.setattr(bases, "is_here", hang)
    await bus.added_bases.add("b", "/models/b", 31)
    try:
        async with running_worker(bus) as (worker, _):
            await wait_until(asked.is_set, "it looks for the files")
            await bus.streams.tell([(worker.wid, m.Control(kind="drain"))])

            async def draining() -> bool:
                beats = (await bus.members.worker_beats()).values()
                return any(beat is not None and beat.draining for beat in beats)

            await wait_until(draining, "its heartbeat says that it drains")
    finally:
        answered.set()
