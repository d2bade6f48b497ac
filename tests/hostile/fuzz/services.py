"""All services of a fleet in a thread of this process, with their own queue.

The worker's engine invents its tokens; everything else is as in production. Cases arrive from outside, by HTTP or
through the queue. If one ends a service, that is a finding.
"""

from __future__ import annotations

import asyncio
import logging
import math
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Awaitable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import orjson
import uvloop
from helpers.adapter_files import write_adapter
from helpers.scripted_fleet import MAX_MODEL_LEN, logprob_record, make_model_folder, running_gateway
from helpers.waiting import wait_until
from tokenizers import Tokenizer

from adapter_store.service import serve as serve_store
from benchmarks.common.fake_worker import FakeEngine, fake_served
from gpu_worker.planning.request import TokenOutput
from gpu_worker.service.service import WorkerService
from lorafleet.launcher.embedded import start_embedded
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from scheduler.service import serve as serve_scheduler


class _Engine(FakeEngine):
    """Also invents logprobs, for requests that want them."""

    def _advance(self, running: Any) -> TokenOutput:
        output, request = super()._advance(running), running.request
        s, ids = request.sampling, request.prompt.tolist()
        own = [logprob_record(id_, s.num_logprobs, listed=s.logprob_token_ids) for id_ in output.ids]
        output.logprobs = b"".join(own)
        if s.prompt_logprobs is not None and not output.seq0:
            records = b"".join(logprob_record(id_, s.prompt_logprobs, rank=1) for id_ in ids)
            output.prompt_logprobs = struct.pack("<f", math.nan) + records[4:]
        return output


class Services:
    """The running services, and their queue."""

    def __init__(self, loop: asyncio.AbstractEventLoop, bus: Bus, tasks: dict[str, asyncio.Task[Any]]) -> None:
        self._loop = loop
        self.bus = bus
        self.tasks = tasks
        self.port = 0
        self.gid = ""
        self.worker: WorkerService | None = None
        self.thread = threading.current_thread()  # the constructor runs in the services' thread

    def cpu_s(self) -> float:
        """Return the CPU seconds used by the services' thread."""
        assert self.thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self.thread.ident))

    def do(self, work: Awaitable[Any]) -> Any:
        """Run an awaitable in the services' thread; return its result."""

        async def awaited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(timeout=60)

    @property
    def wid(self) -> str:
        """The worker's id."""
        assert self.worker is not None
        return self.worker.wid

    def ended(self) -> list[str]:
        """Return a message for each service that has ended, with the cause."""
        return [f"{name} ended: {_how(task)}" for name, task in self.tasks.items() if task.done()]


def _how(task: asyncio.Task[Any]) -> str:
    if task.cancelled() or (error := task.exception()) is None:
        return "by itself"
    return "".join(traceback.format_exception(error))[-2000:]


@contextmanager
def services(**settings: Any) -> Iterator[Services]:
    """Start the services; they end with the block."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-fuzz-") as name:
        folder = Path(name)
        queue = start_embedded(folder / "queue", durable=False)
        told: Future[tuple[Services, asyncio.Event]] = Future()
        thread = threading.Thread(target=uvloop.run, args=(_serve(queue.url, folder, settings, told),))
        thread.start()
        try:
            running, stop = told.result(timeout=60)
            try:
                yield running
            finally:
                running._loop.call_soon_threadsafe(stop.set)
        finally:
            thread.join(timeout=60)
            queue.stop()


async def _serve(
    url: str, folder: Path, settings: dict[str, Any], told: Future[tuple[Services, asyncio.Event]]
) -> None:
    logging.disable(logging.ERROR)  # thousands of refused messages would be logged
    stop, model, adapters = asyncio.Event(), make_model_folder(folder / "model"), folder / "adapters"
    write_adapter(adapters / "one")
    values = {"redis_url": url, "model": str(model), "data": folder / "data", "adapters": adapters, **settings}
    mine = Settings(scan_interval_s=0.1, worker_name="w", **values)
    bus, own = Bus(url), Bus(url)
    vocab_size = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size()
    engine = _Engine(step_s=0.001, vocab_size=vocab_size)
    served = msgspec.structs.replace(fake_served("tiny", vocab_size), max_model_len=MAX_MODEL_LEN)
    worker = WorkerService(own, engine, served, mine)
    tasks = {
        "scheduler": asyncio.create_task(serve_scheduler(mine, stop)),
        "store": asyncio.create_task(serve_store(mine, stop)),
        "worker": asyncio.create_task(worker.run(stop)),
    }
    try:
        await wait_until(lambda: _is_up(bus, worker), "scheduler and worker are up")
        more = {name: value for name, value in values.items() if name not in ("redis_url", "model")}
        async with running_gateway(bus, model, **more) as gateway:
            tasks["gateway"] = gateway.task
            running = Services(asyncio.get_running_loop(), bus, tasks)
            running.port, running.gid, running.worker = int(gateway.url.rpartition(":")[2]), gateway.gid, worker
            told.set_result((running, stop))
            await stop.wait()
    except BaseException as error:
        if not told.done():
            told.set_exception(error)
        raise
    finally:
        stop.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        engine.stop()
        await own.close()
        await bus.close()
        logging.disable(logging.NOTSET)


async def _is_up(bus: Bus, worker: WorkerService) -> bool:
    if not worker.wid or not await bus.has_leader():
        return False
    return worker.wid in await bus.members.ids(bus.keys.workers)


def json_error(raw: bytes) -> str:
    """Return the kind of an error of any API. Raises AssertionError if the error does not have the API's format."""
    body = orjson.loads(raw)
    error = body["error"]
    if isinstance(error, dict):
        assert set(error) in ({"message", "type", "param", "code"}, {"message", "type"}, {"message", "type", "details"})
        message, kind = error["message"], error.get("code") or error["type"]
    else:
        message, kind = error, body.get("error_type", "error")  # Ollama's errors have no kind
    assert isinstance(message, str), body
    assert message, body
    assert len(message) < 20_000, f"a message of {len(message)} characters"
    return str(kind)
