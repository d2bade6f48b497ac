"""A worker whose step never ends: its process exits and logs where it was stuck, even if no other thread can run."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
from helpers.waiting import wait_until

from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m

PROGRAM = """
import re, sys
from types import SimpleNamespace
from benchmarks.common.fake_worker import fake_served
from gpu_worker.service import program
from gpu_worker.engine.engine_thread import EngineThread
from protocol.runtime.service import run
from protocol.runtime.settings import Settings
from protocol.wire import messages as m

class StuckEngine:
    can_step = has_work = False
    adapters = SimpleNamespace(events=SimpleNamespace(take=lambda: ([], {})))

    def __init__(self):
        self.held = []

    def add(self, request):
        self.held.append(request.rid)

    def step(self):
        if self.held:
            re.match("(a+)+$", "a" * 64 + "b")  # never lets go of the interpreter
        return []

    def hand_over(self):
        return self.held

    def stats(self):
        return m.WorkerBeat(wid="", name="", capacity=4)

    def wake_with(self, wake):
        pass

    check_integrity = close = finish_start = extend_memory = lambda self: None

program.Loader = lambda bearer: SimpleNamespace(close=lambda: None, set_urls=lambda urls: None)
program._load = lambda settings, loader: (EngineThread(StuckEngine()), fake_served())
settings = Settings(redis_url=sys.argv[1], worker_name="stuck", max_step_s=2.0)
sys.exit(run(lambda stop: program.serve(settings, stop)))
"""

PROMPT = np.arange(1, 6, dtype="<i4").tobytes()


async def test_a_worker_in_a_step_that_never_ends_is_ended(bus: Bus) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, bus.url, stderr=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    try:
        wids: list[str] = []

        async def has_joined() -> bool:
            wids[:] = list(await bus.members.worker_beats())
            return bool(wids)

        await wait_until(has_joined, "the worker joins")
        sub = m.RequestHead(
            rid="r", tenant="t", cls="interactive", digest="", num_prompt_tokens=5, max_new_tokens=8,
            deadline_ms=now_ms() + 3_600_000, gateway="",
        )  # fmt: skip
        body = m.Body(prompt=PROMPT, sampling=m.Sampling(), max_new_tokens=8)
        assert (await bus.submit(sub.cls, [(sub, body)], max_queued=100))[0] == "ok"
        assert (await bus.assign(wids[0], [(m.Assigned("r", 1, "", "t", ""), 0)]))[0] == "ok"
        _, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 1
    assert "in step" in log.decode()
    outcomes = await bus.requeue(wids[0], ["r"], counts=True, max_attempts=3)
    assert outcomes == {"r": "requeued"}, "nobody else had it"
