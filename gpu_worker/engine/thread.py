"""The thread that runs an engine, behind methods that any thread may call."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from gpu_worker.encoder.engine import EncoderEngine
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.request import EngineRequest, EngineStats, TokenOutput
from protocol.wire.messages import AdapterEvent
from protocol.wire.records import AdapterUse

logger = logging.getLogger(__name__)

MAX_UNACKED_STEPS = 8
"""Steps whose outputs may be on their way to the queue; then the engine waits, so that a slow queue bounds memory."""

STATS_S = 0.1
"""How old the engine's figures may be while it is busy; when it has nothing to do they are exact."""

CHECK_S = 10.0
"""How often an idle engine looks for lost blocks and pages; a leak is a crash, not a slow death."""


class EngineThread:
    """Runs `engine.step` while there is work. Commands are applied between steps, in the order they were given."""

    def __init__(self, engine: Engine | EncoderEngine, max_unacked_steps: int = MAX_UNACKED_STEPS) -> None:
        self.engine = engine
        self._max_unacked = max_unacked_steps
        self._changed = threading.Condition()
        self._commands: list[Callable[[], object]] = []  # guarded by _changed, as the next four
        self._handovers: list[Future[list[str]]] = []
        self._num_unacked = 0
        self._stopping = False
        self._dead = False
        self._can_step = False  # used by the engine's thread alone
        self._stats = engine.stats()
        self._stats_due = 0.0
        self._check_due = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        engine.wake_with(lambda: self._post(_nothing))

    def start(
        self,
        on_outputs: Callable[[list[TokenOutput]], object],
        on_death: Callable[[BaseException | None], object],
    ) -> None:
        """Start the thread. It calls `on_outputs` once per step that made something, `on_death` if it crashes."""
        self._on_outputs, self._on_death = on_outputs, on_death
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Give the engine a request."""
        self._post(lambda: self.engine.add(request))

    def cancel(self, rids: Sequence[str]) -> None:
        """Forget requests; after the current step nothing more comes out for them."""
        self._post(lambda: [self.engine.cancel(rid) for rid in rids])

    def prefetch(self, digest: str) -> None:
        """Bring an adapter towards the pool, for a request that will come."""
        self._post(lambda: self.engine.prefetch(digest))

    def pin(self, digest: str) -> None:
        """Keep an adapter in the pool from now on."""
        self._post(lambda: self.engine.orders.pin(digest))

    def unpin(self, digest: str) -> None:
        """Let an adapter leave the pool again."""
        self._post(lambda: self.engine.orders.unpin(digest))

    def evict(self, digest: str, order: str) -> None:
        """Send an adapter away as soon as nobody uses it; the event of that repeats `order`."""
        self._post(lambda: self.engine.orders.evict(digest, order))

    def set_queued(self, digests: list[str]) -> None:
        """Say which adapters requests in the fleet's queue wait for."""
        self._post(lambda: self.engine.adapters.set_queued(digests))

    def take_news(self) -> tuple[list[AdapterEvent], dict[str, AdapterUse]]:
        """Return what happened to adapters since the last call."""
        return self.engine.adapters.events.take()

    def hand_over(self) -> Future[list[str]]:
        """Forget every request at the next step boundary; the result names them. Empty if the engine has ended."""
        future: Future[list[str]] = Future()
        with self._changed:
            if self._dead:
                future.set_result([])
            else:
                self._handovers.append(future)
                self._changed.notify()
        return future

    def ack_step(self) -> None:
        """Say that the outputs of one step are durable."""
        with self._changed:
            self._num_unacked -= 1
            self._changed.notify()

    def stats(self) -> EngineStats:
        """Return the engine's figures of at most `STATS_S` ago."""
        return self._stats

    def stop(self) -> None:
        """End the thread after its current step and wait for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _post(self, command: Callable[[], object]) -> None:
        with self._changed:
            if not self._dead:
                self._commands.append(command)
                self._changed.notify()

    def _run(self) -> None:
        error: BaseException | None = None
        # The model stays: the collector need not walk over all its objects, 0.1 s each time, in the middle of steps.
        gc.collect()
        gc.freeze()
        try:
            self._loop()
        except Exception as crash:  # the loop's edge: whoever gave this engine requests must hear of it
            logger.exception("the engine crashed")
            error = crash
        gc.unfreeze()
        with self._changed:
            self._dead = True
            handovers, self._commands, self._handovers = self._handovers, [], []
        for future in handovers:
            future.set_result([])
        self.engine.close()
        if error is not None:
            self._on_death(error)

    def _refresh_stats(self) -> None:
        now = time.monotonic()
        if not self._can_step or now > self._stats_due:
            self._stats = self.engine.stats()
            self._stats_due = now + STATS_S

    def _has_work(self) -> bool:
        can_step = self._can_step and self._num_unacked < self._max_unacked
        return self._stopping or bool(self._commands or self._handovers) or can_step

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._stopping:
                    return
                commands, self._commands = self._commands, []
                handovers, self._handovers = self._handovers, []
            for command in commands:
                command()
            for future in handovers:
                future.set_result(self.engine.hand_over())
            outputs: list[TokenOutput] = []
            self._can_step = True
            if self._num_unacked < self._max_unacked:
                outputs = self.engine.step()
                self._can_step = self.engine.can_step
            self._refresh_stats()
            if outputs:
                with self._changed:
                    self._num_unacked += 1
                self._on_outputs(outputs)
            if not self.engine.has_work and time.monotonic() > self._check_due:
                self.engine.check_integrity()
                self._check_due = time.monotonic() + CHECK_S


def _nothing() -> None:
    """Wake the loop."""
