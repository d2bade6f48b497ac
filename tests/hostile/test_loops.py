"""An unexpected error is raised in every loop of every service, without an attacker.

The process survives, its other loops continue, the metric counts the failure, and the loop resumes its work.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.flaky import Flaky, InjectedError, failures
from helpers.scripted_fleet import make_model_folder, playing, running_gateway
from helpers.waiting import wait_until

from adapter_store.service import Store
from adapter_store.service import serve as serve_store
from gateway import service as gateway_service
from gateway.batches.runner import BatchRunner
from gpu_worker.service.service import WorkerService
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from scheduler.session import Session
from tests.gpu_worker.service.fakes import assign, running_worker
from tests.gpu_worker.service.fakes import state as state_of_worker
from tests.gpu_worker.service.fakes import submit as submit_to_worker
from tests.scheduler.fakes import FakeWorker, holds, make_submit, running_scheduler, submit

LOOPS = {
    "gateway": {
        "replies", "out stream", "fleet view", "adapter events", "event loop", "expired files", "conversations",
        "time series", "refused calls", "webhooks", "batches", "history", "added bases",
    },
    "scheduler": {"submissions", "assignments", "watch", "lease"},
    "worker": {"intake", "publishing", "beats", "added bases"},
    "store": {"beats", "adapter events", "catalogue"},
}  # fmt: skip
"""Service -> its loops. A new loop fails these tests until it is added here."""

ROOT = Path(__file__).parents[2]


class PanicException(BaseException):
    """Equivalent of a panic in a Rust library."""


def make_flaky(monkeypatch: pytest.MonkeyPatch, flaky: Flaky, *owners: type) -> None:
    """Put `flaky` between the loops of these classes and their work."""
    for owner in owners:
        name = "loop" if owner is BatchRunner else "loops"
        real: Any = getattr(owner, name)

        def changed(self: Any, *args: Any, real: Any = real) -> Any:
            found = real(self, *args)
            return [flaky(loop) for loop in found] if isinstance(found, list) else flaky(found)

        monkeypatch.setattr(owner, name, changed)


async def ask(url: str) -> None:
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        answer = await http.post("/v1/completions", json={"model": "base", "prompt": "a", "max_tokens": 4})
        assert answer.status_code == 200, answer.text
        assert (await http.get("/health")).status_code == 200


async def test_each_loop_of_a_gateway_may_raise(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    folder = make_model_folder(tmp_path / "model")
    async with playing(bus.url, folder):
        for name in ("", *sorted(LOOPS["gateway"])):
            with subtests.test(loop=name or "all at once"), monkeypatch.context() as patch:
                flaky = Flaky(frozenset({name}), error=PanicException if name == "webhooks" else InjectedError)
                make_flaky(patch, flaky, gateway_service._Parts, BatchRunner)
                before = failures(LOOPS["gateway"])
                async with running_gateway(bus, folder, history=f"sqlite:///{tmp_path}/history.db") as gateway:
                    await wait_until(flaky.goes_on, "all loops go on")
                    await ask(gateway.url)
                    assert not gateway.task.done()
                assert flaky.names == LOOPS["gateway"]
                after = failures(LOOPS["gateway"])
                counted = {one: after[one] - before[one] for one in after if after[one] > before[one]}
                assert counted == {one: float(num) for one, num in flaky.failed.items()}


async def test_a_loop_that_never_recovers_stops_no_other(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Everything that calls do not need fails permanently."""
    folder, spared = make_model_folder(tmp_path / "model"), {"replies", "out stream", "fleet view"}
    flaky = Flaky(frozenset(LOOPS["gateway"] - spared), times=1_000_000)
    make_flaky(monkeypatch, flaky, gateway_service._Parts, BatchRunner)
    url = f"sqlite:///{tmp_path}/history.db"
    async with playing(bus.url, folder), running_gateway(bus, folder, history=url) as gateway:
        await wait_until(lambda: min(flaky.failed[name] for name in flaky.failing) > 5, "they fail again and again")
        await ask(gateway.url)
        assert not gateway.task.done()


async def test_each_loop_of_a_scheduler_may_raise(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    for number, name in enumerate(sorted(LOOPS["scheduler"])):
        with subtests.test(loop=name), monkeypatch.context() as patch:
            # A failure while it holds the scheduler's state ends the leadership; the next leader reads the queue.
            flaky = Flaky(frozenset({name}), times=1)
            make_flaky(patch, flaky, Session)
            worker = await FakeWorker(bus, f"w{number}", capacity=8).join()
            async with running_scheduler(bus):
                await wait_until(flaky.goes_on, "all loops go on")
                await submit(bus, make_submit(f"r{number}"))
                await holds(worker, f"r{number}")
                assert await worker.write(f"r{number}", 4, end=True) == []
            assert flaky.names == LOOPS["scheduler"]
            await bus.members.leave(worker.wid)


async def test_each_loop_of_a_worker_may_raise(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    for number, name in enumerate(("", *sorted(LOOPS["worker"]))):
        with subtests.test(loop=name or "all at once"), monkeypatch.context() as patch:
            flaky, rid = Flaky(frozenset({name})), f"r{number}"
            make_flaky(patch, flaky, WorkerService)
            async with running_worker(bus) as (worker, _):
                await wait_until(flaky.goes_on, "all loops go on")
                await submit_to_worker(bus, rid)
                assert await assign(bus, worker.wid, rid) == "ok"

                async def is_done(rid: str = rid) -> bool:
                    return await state_of_worker(bus, rid) == "completed"

                await wait_until(is_done, "the request is answered")
            assert flaky.names == LOOPS["worker"]


async def test_each_loop_of_a_store_may_raise(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    (tmp_path / "adapters").mkdir()
    settings = Settings(
        redis_url=bus.url, adapters=tmp_path / "adapters", data=tmp_path / "data", scan_interval_s=0.05, store_port=0
    )
    for name in ("", *sorted(LOOPS["store"])):
        with subtests.test(loop=name or "all at once"), monkeypatch.context() as patch:
            flaky, stop = Flaky(frozenset({name})), asyncio.Event()
            make_flaky(patch, flaky, Store)
            task = asyncio.create_task(serve_store(settings, stop))
            await wait_until(lambda flaky=flaky: bool(flaky.names) and flaky.goes_on(), "all loops go on")
            assert not task.done()
            stop.set()
            assert await task == 0
            assert flaky.names == LOOPS["store"]


def test_no_loop_runs_but_guarded() -> None:
    """Only the HTTP server ends its process when it ends."""
    unguarded = [
        (path.relative_to(ROOT).as_posix(), line.strip())
        for service in ("gateway", "scheduler", "gpu_worker", "adapter_store")
        for path in sorted((ROOT / service).rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(r"\bunending\(", line)
    ]
    assert len(unguarded) == 1, unguarded
    assert "server.serve" in unguarded[0][1]
