"""The thread that runs an engine, behind methods that any thread may call. The service imports it before torch."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from gpu_worker.planning.request import EngineRequest, TokenOutput
from protocol.wire import messages as m
from protocol.wire.messages import AdapterEvent
from protocol.wire.records import AdapterUse

if TYPE_CHECKING:
    from gpu_worker.engine.base import BaseEngine

logger = logging.getLogger(__name__)

MAX_COMMANDS = 1024
"""Commands that may wait for the engine before `room` makes the service stop reading more of them from the queue."""

MAX_UNACKED_STEPS = 8
"""Steps whose outputs may be on their way to the queue; then the engine waits, so that a slow queue bounds memory."""

STATS_S = 0.1
"""How old the engine's figures may be while it is busy; when it has nothing to do they are exact."""

TURN_S = 1.0
"""How long an idle engine waits at most before it goes round once more, which shows that it lives."""

CHECK_S = 10.0
"""How often an idle engine looks for lost blocks and pages: a leak is a crash, so that it is found at once."""

OnOutputs = Callable[[list[TokenOutput]], object]
"""Called in the engine's thread with the outputs of one step."""

OnDeath = Callable[[BaseException], object]
"""Called in the engine's thread with the error that ended it."""

T = TypeVar("T")


class EngineThread:
    """Runs `engine.step` while there is work. All methods but `stop` return at once, from any thread.

    Commands are carried out between steps, in the order they were given, and ignored once the engine has ended.
    """

    def __init__(self, engine: BaseEngine, *, max_commands: int = MAX_COMMANDS) -> None:
        self.engine = engine
        self._max_commands = max_commands
        self._changed = threading.Condition()
        # _changed guards these.
        self._commands: list[Callable[[], object]] = []
        self._waiting_for_room: list[Future[None]] = []
        self._hand_overs: list[Future[list[str]]] = []
        self._num_unacked = 0
        self._is_woken = False
        self._is_stopping = False
        self.has_ended = False  # the thread takes nothing more: it was stopped, or it has crashed
        # Only the engine's thread writes these.
        self.num_turns = 0  # how often it has gone round: at least once a second, but for a step that takes longer
        self._can_step = False
        self._stats = engine.stats()
        self._stats_due_s = 0.0
        self._check_due_s = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        engine.wake_with(self._wake)

    @property
    def num_commands(self) -> int:
        """Commands that the engine has not taken yet."""
        return len(self._commands)

    def start(self, on_outputs: OnOutputs, on_death: OnDeath) -> None:
        """Start the thread. It calls `on_outputs` once per step that put anything out, `on_death` if it crashes."""
        self._on_outputs, self._on_death = on_outputs, on_death
        self._thread.start()

    def finish_start(self) -> None:
        """Make what the fleet need not wait for: the engine serves requests after that. It may be asked for again."""
        self._command(self.engine.finish_start)

    def submit(self, request: EngineRequest) -> None:
        """Give the engine a request. Its errors are emitted as output."""
        self._command(lambda: self.engine.add(request))

    def cancel(self, rids: Sequence[str]) -> None:
        """Forget requests; after the current step nothing more comes out for them."""
        self._command(lambda: [self.engine.cancel(rid) for rid in rids])

    def prefetch(self, digest: str) -> None:
        """Bring an adapter towards the pool, for a request that will come."""
        self._command(lambda: self.engine.prefetch(digest))

    def pin(self, digest: str) -> None:
        """Keep an adapter in the pool from now on."""
        self._command(lambda: self.engine.residency.pin(digest))

    def unpin(self, digest: str) -> None:
        """Let an adapter leave the pool like any other."""
        self._command(lambda: self.engine.residency.unpin(digest))

    def evict(self, digest: str, order: str) -> None:
        """Remove an adapter as soon as no request needs it. An event that repeats `order` reports what that freed."""
        self._command(lambda: self.engine.residency.evict(digest, order))

    def set_queued(self, digests: list[str]) -> None:
        """Say which adapters requests in the fleet's queue wait for: they leave the pool after all others."""
        self._command(lambda: self.engine.adapters.set_queued(digests))

    def take_adapter_events(self) -> tuple[list[AdapterEvent], dict[str, AdapterUse]]:
        """Return what happened to adapters since the last call, and how they were used, by digest."""
        return self.engine.adapters.events.take()

    def room(self) -> Future[None]:
        """Return a future that is done while fewer than `max_commands` wait, or once the engine has ended.

        Commands are taken without it too: it is for a caller to wait for before it gives many.
        """
        future: Future[None] = Future()
        with self._changed:
            if len(self._commands) < self._max_commands:
                future.set_result(None)
            else:
                self._waiting_for_room.append(future)
        return future

    def hand_over(self) -> Future[list[str]]:
        """Forget every request between two steps; the result names them. Empty if the engine has ended."""
        future: Future[list[str]] = Future()
        with self._changed:
            if self.has_ended:
                future.set_result([])
            else:
                self._hand_overs.append(future)
                self._changed.notify()
        return future

    def ack_step(self) -> None:
        """Say that the outputs of one step are durable. The engine pauses while too many steps are not."""
        with self._changed:
            self._num_unacked -= 1
            self._changed.notify()

    def stats(self) -> m.WorkerBeat:
        """Return the engine's figures of at most `STATS_S` ago."""
        return self._stats

    def stop(self) -> None:
        """End the thread after its current step, and wait for it."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _command(self, command: Callable[[], object]) -> None:
        with self._changed:
            if not self.has_ended:
                self._commands.append(command)
                self._changed.notify()

    def _wake(self) -> None:
        """Let the engine try a step: an adapter or a grammar has arrived."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    # ------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        error: BaseException | None = None
        # The model stays until the process ends. Each full collection would walk all its objects between steps, for
        # 0.1 s.
        gc.collect()
        gc.freeze()
        try:
            while self._wait_for_work():
                self._take_commands()
                self._hand_requests_over()
                self._step()
                self._check_when_idle()
        except BaseException as crash:  # noqa: BLE001  the thread's edge, also for panics of libraries in Rust
            error = crash
        try:
            self._end()
        except BaseException as crash:  # noqa: BLE001  see above
            error = error or crash
        if error is not None:
            logger.error("the engine crashed", exc_info=error)
            self._on_death(error)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do. Returns False when the thread is to end."""

        def has_work() -> bool:
            may_step = self._is_woken or (self._can_step and self._num_unacked < MAX_UNACKED_STEPS)
            return self._is_stopping or bool(self._commands or self._hand_overs) or may_step

        with self._changed:
            self.num_turns += 1
            while not self._changed.wait_for(has_work, TURN_S):
                self.num_turns += 1
            self._is_woken = False
            return not self._is_stopping

    def _take_commands(self) -> None:
        """Carry out all commands given so far."""
        with self._changed:
            commands, self._commands = self._commands, []
            waiting, self._waiting_for_room = self._waiting_for_room, []
        for future in waiting:
            _resolve(future, None)
        for command in commands:
            command()

    def _hand_requests_over(self) -> None:
        # A future stays in the list until it has its result, so that `_end` resolves it if the engine crashes.
        while self._hand_overs:
            rids = self.engine.hand_over()
            with self._changed:
                future = self._hand_overs.pop(0)
            _resolve(future, rids)

    def _step(self) -> None:
        """Run a step, unless too many are not durable yet, and pass on its outputs."""
        outputs = []
        self._can_step = True
        if self._num_unacked < MAX_UNACKED_STEPS:
            outputs = self.engine.step()
            self._can_step = self.engine.can_step
        now_s = time.monotonic()
        if not self._can_step or now_s > self._stats_due_s:
            self._stats = self.engine.stats()
            self._stats_due_s = now_s + STATS_S
        if outputs:
            with self._changed:
                self._num_unacked += 1
            self._on_outputs(outputs)

    def _check_when_idle(self) -> None:
        if not self.engine.has_work and time.monotonic() > self._check_due_s:
            self.engine.check_integrity()
            self._check_due_s = time.monotonic() + CHECK_S

    def _end(self) -> None:
        """Leave nobody waiting, and take nothing more."""
        with self._changed:
            self.has_ended = True
            self._commands = []
            waiting, self._waiting_for_room = self._waiting_for_room, []
            hand_overs, self._hand_overs = self._hand_overs, []
        for future in waiting:
            _resolve(future, None)
        for future in hand_overs:
            _resolve(future, [])
        self.engine.close()


def _resolve(future: Future[T], result: T) -> None:
    """Set a future's result, unless its waiter has cancelled it."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)
