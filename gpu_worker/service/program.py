"""A worker's process: loads a base, works for the queue, and re-executes itself to serve another base.

A worker that the scheduler orders to another base leaves the fleet as if stopped, closes everything, and executes its
own program again with `SWAP_VARIABLE`, which names the base. So two bases are never in memory at once, and a process
supervisor sees no exit. If the process dies, it restarts with the base in its settings.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec

from gpu_worker.adapters.loader.client import Loader
from gpu_worker.engine.engine_thread import EngineThread
from gpu_worker.light_imports import import_transformers
from gpu_worker.service.bases import WorkerBases
from gpu_worker.service.conversions import failure_reason
from gpu_worker.service.service import WorkerService
from protocol.queue.bus import CONNECTION_ERRORS, Bus
from protocol.runtime.again import SWAP_VARIABLE, began_ms, start_again
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.imports import importing
from protocol.runtime.model_files import worker_bases
from protocol.runtime.sealing import Seal
from protocol.runtime.settings import Settings
from protocol.runtime.tracing import tracing
from protocol.runtime.watchdog import LOADING_S, WATCHDOG
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.errors import BadRequest, Conflict, UnreadableRecord

logger = logging.getLogger(__name__)

SWITCH_S = 0.0001
"""Python's switch interval, in seconds: how long the engine's thread waits for the GIL that the event loop holds.

In Python's default of 5 ms, the loop finishes all its work for a step, and the engine would wait for that.
"""


class BaseStart(msgspec.Struct, frozen=True):
    """The base that a process serves. Each failed start has fewer fallbacks, so that starts come to an end."""

    base: str
    fallbacks: tuple[str, ...]  # bases to serve instead if this one does not start, in order
    began_ms: int  # unix time when the start began
    added: dict[str, str] = {}  # models of bases added by operators, by name

    @classmethod
    def of(cls, settings: Settings, bases: Mapping[str, Settings]) -> BaseStart:
        """Return the start handed over by the process that this one replaced, else the one in the settings.

        The variable is read and removed. bases: those in the settings. Raises BadRequest for a base that is unknown.
        """
        if left := os.environ.pop(SWAP_VARIABLE, ""):
            start = msgspec.json.decode(left, type=cls)
        else:
            own = settings.base or next(iter(bases))
            others = tuple(name for name in bases if name != own) if settings.swaps else ()
            start = cls(own, others, began_ms())
        if start.base not in {*bases, *start.added}:
            raise BadRequest(f"--base: {start.base} is none of this worker's bases, {', '.join(bases)}")
        return start


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Serve a base until `stop`, or until another base must be served. Return the exit code. Raises LorafleetError.

    In the second case, and if the base fails to start but others may, the process re-executes itself.
    """
    start = BaseStart.of(settings, worker_bases(settings))
    with tracing(settings, "worker", settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"):
        code, following = await _serve(WorkerBases(settings, start.base, start.added), start, stop)
    if following is None:
        return code
    with _ended_by_signals():
        await asyncio.sleep(0.01)  # a pending signal is still in the event loop, which reads it now
        if not stop.is_set():
            start_again({SWAP_VARIABLE: msgspec.json.encode(following).decode()})
    return 0


async def _serve(bases: WorkerBases, start: BaseStart, stop: asyncio.Event) -> tuple[int, BaseStart | None]:
    """Load the model and work for the queue until `stop` or an order.

    Return the exit code and, if another base must be served, its start. Raises the error if no other base can be served
    or the failure is not this base's. Everything is closed on return.
    """
    settings = bases.settings(start.base)
    secret = FleetSecret.of(settings)
    bus = Bus(settings.queue_url(), seal=Seal.of(settings, secret))
    loader = Loader(secret.bearer if secret else "")
    is_loaded = False
    try:
        asked_s = time.monotonic()
        if not await bus.server.reach(stop):
            return 0, None
        waited_ms = round(1000 * (time.monotonic() - asked_s))  # not part of the start time
        WATCHDOG.require(None, LOADING_S)
        try:
            with _ended_by_signals():
                engine, served = await asyncio.to_thread(_load, settings, loader)
            is_loaded = True
            if stop.is_set():
                return 0, None
            sys.setswitchinterval(SWITCH_S)
            # Once the engine's thread has ended it cannot be stuck; the remaining work is the event loop's.
            WATCHDOG.require(lambda: object() if engine.has_ended else engine.num_turns, settings.max_step_s)
            service = WorkerService(bus, engine, served, settings, loader, start.began_ms + waited_ms, bases)
            if (code := await service.run(stop)) or not service.becomes:
                return code, None
            if service.becomes not in bases.others:  # removed while the worker left
                return 0, msgspec.structs.replace(start, began_ms=now_ms())
            return 0, BaseStart(service.becomes, (start.base,), now_ms(), bases.added)
        except Exception as error:
            if is_loaded and not isinstance(error, Conflict):
                raise
            name, why = settings.served_name, failure_reason(error)
            if not (settings.more_models or start.added or name in (await bus.added_bases.get()).bases):
                raise
            try:
                await bus.members.note_failure(name, why)  # calls to other bases continue
            except (*CONNECTION_ERRORS, UnreadableRecord) as away:
                logger.warning("the reason why %s does not start cannot be recorded: %s", name, away)
            if not start.fallbacks:
                raise
            logger.warning("%s cannot be served: %s; serving %s instead", name, why, start.fallbacks[0])
            return 0, BaseStart(start.fallbacks[0], start.fallbacks[1:], now_ms(), start.added)
    finally:
        loader.close()
        await bus.close()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals end the process at once: it holds nothing of the fleet, and the work inside may take long."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _load(settings: Settings, loader: Loader) -> tuple[EngineThread, m.ServedModel]:
    """Build the engine. Runs in a thread and imports torch only here, so that importing this module is fast."""
    with importing():
        import_transformers(settings)
        from gpu_worker.build import load_engine

    return load_engine(settings, loader.fetch, loader.describe, loader.fetch_files)
