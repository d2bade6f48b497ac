"""The thread that runs an engine, with methods that any thread may call.

The service imports this module before torch.
"""

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
"""Pending commands beyond which `room` makes the service stop reading more from the queue."""

MAX_UNACKED_STEPS = 8
"""Maximum steps whose outputs are not durable yet; the engine then pauses, so that a slow queue cannot fill memory."""

STATS_S = 0.1
"""Maximum age, in seconds, of a busy engine's figures; those of an idle engine are exact."""

TURN_S = 1.0
"""Maximum seconds between two turns of an idle engine's loop; its count of turns shows that it is alive."""

CHECK_S = 10.0
"""Seconds between an idle engine's checks for leaked blocks and pages; a leak crashes it, so as to be found at once."""

OnOutputs = Callable[[list[TokenOutput]], object]
"""Called in the engine's thread with the outputs of one step."""

OnDeath = Callable[[BaseException], object]
"""Called in the engine's thread with the error that ended it."""

T = TypeVar("T")


class EngineThread:
    """Runs `engine.step` while there is work. All methods except `stop` return at once and may be called by any thread.

    Commands run between steps in the order given, and are ignored once the engine has ended.
    """

    def __init__(self, engine: BaseEngine, *, max_commands: int = MAX_COMMANDS) -> None:
        self.engine = engine
        self._max_commands = max_commands
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._commands: list[Callable[[], object]] = []
        self._waiting_for_room: list[Future[None]] = []
        self._hand_overs: list[Future[list[str]]] = []
        self._num_unacked = 0
        self._is_woken = False
        self._is_stopping = False
        self.has_ended = False  # the thread was stopped or has crashed, and ignores commands
        # Written by the engine's thread only:
        self.num_turns = 0  # loop iterations: at least one per second, unless a step takes longer
        self._can_step = False
        self._stats = engine.stats()
        self._stats_due_s = 0.0
        self._check_due_s = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        engine.wake_with(self._wake)

    @property
    def num_commands(self) -> int:
        """The number of commands that the engine has not taken yet."""
        return len(self._commands)

    def start(self, on_outputs: OnOutputs, on_death: OnDeath) -> None:
        """Start the thread. It calls `on_outputs` once per step with outputs, and `on_death` if it crashes."""
        self._on_outputs, self._on_death = on_outputs, on_death
        self._thread.start()

    def finish_start(self) -> None:
        """Do the start-up work that the fleet need not wait for; requests are served afterwards. Idempotent."""
        self._command(self.engine.finish_start)

    def submit(self, request: EngineRequest) -> None:
        """Add a request to the engine. Its errors are emitted as output."""
        self._command(lambda: self.engine.add(request))

    def cancel(self, rids: Sequence[str]) -> None:
        """Forget requests; after the current step nothing more is emitted for them."""
        self._command(lambda: [self.engine.cancel(rid) for rid in rids])

    def prefetch(self, digest: str) -> None:
        """Load an adapter ahead of time, for a request that is about to come."""
        self._command(lambda: self.engine.prefetch(digest))

    def pin(self, digest: str) -> None:
        """Keep an adapter in the pool until `unpin`."""
        self._command(lambda: self.engine.residency.pin(digest))

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted like any other again."""
        self._command(lambda: self.engine.residency.unpin(digest))

    def evict(self, digest: str, order: str) -> None:
        """Evict an adapter as soon as no request needs it. The event with the same `order` reports the freed memory."""
        self._command(lambda: self.engine.residency.evict(digest, order))

    def set_queued(self, digests: list[str]) -> None:
        """Set the adapters that queued requests of the fleet wait for: they are evicted last."""
        self._command(lambda: self.engine.adapters.set_queued(digests))

    def take_adapter_events(self) -> tuple[list[AdapterEvent], dict[str, AdapterUse]]:
        """Return the adapter events since the last call, and the use of adapters, by digest."""
        return self.engine.adapters.events.take()

    def room(self) -> Future[None]:
        """Return a future that is done once fewer than `max_commands` wait, or once the engine has ended.

        Commands are also accepted without it: callers wait for it before they give many.
        """
        future: Future[None] = Future()
        with self._changed:
            if len(self._commands) < self._max_commands:
                future.set_result(None)
            else:
                self._waiting_for_room.append(future)
        return future

    def hand_over(self) -> Future[list[str]]:
        """Forget every request between two steps; the result is their ids, empty if the engine has ended."""
        future: Future[list[str]] = Future()
        with self._changed:
            if self.has_ended:
                future.set_result([])
            else:
                self._hand_overs.append(future)
                self._changed.notify()
        return future

    def ack_step(self) -> None:
        """Report that the outputs of one step are durable. The engine pauses while too many steps are not."""
        with self._changed:
            self._num_unacked -= 1
            self._changed.notify()

    def stats(self) -> m.WorkerBeat:
        """Return the engine's figures, at most `STATS_S` old while it is busy."""
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
        """Make the engine try a step: an adapter or a grammar is ready."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    # ------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        error: BaseException | None = None
        # The model lives until the process ends. Without freezing, each full collection would walk all its objects
        # between steps, for 0.1 s.
        gc.collect()
        gc.freeze()
        try:
            while self._wait_for_work():
                self._take_commands()
                self._hand_requests_over()
                self._step()
                self._check_when_idle()
                self._extend_memory_when_idle()
        except BaseException as crash:  # noqa: BLE001  the thread's top level; also catches panics of libraries in Rust
            error = crash
        try:
            self._end()
        except BaseException as crash:  # noqa: BLE001  see above
            error = error or crash
        if error is not None:
            logger.error("the engine crashed", exc_info=error)
            self._on_death(error)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do. Return False when the thread must end."""
        with self._changed:
            self.num_turns += 1
            while not self._changed.wait_for(self._has_turn, TURN_S):
                self.num_turns += 1
            self._is_woken = False
            return not self._is_stopping

    def _has_turn(self) -> bool:
        """Return whether the loop has something to do now."""
        may_step = self._is_woken or (self._can_step and self._num_unacked < MAX_UNACKED_STEPS)
        return self._is_stopping or bool(self._commands or self._hand_overs) or may_step

    def _take_commands(self) -> None:
        """Run all commands given so far."""
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
        """Run a step and pass on its outputs; do nothing while too many steps are not durable."""
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

    def _extend_memory_when_idle(self) -> None:
        while self._is_idle() and self.engine.extend_memory():
            self.num_turns += 1

    def _is_idle(self) -> bool:
        with self._changed:
            return not self._has_turn() and not self.engine.has_work

    def _end(self) -> None:
        """Resolve all futures and accept no more commands."""
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
    """Set a future's result, unless its waiter has canceled it."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)
