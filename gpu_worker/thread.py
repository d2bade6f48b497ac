"""The thread that runs an engine, behind methods that any thread may call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from gpu_worker.engine import Engine
from gpu_worker.request import EngineRequest, EngineStats, TokenOutput

logger = logging.getLogger(__name__)

MAX_UNACKED_STEPS = 8
"""Steps whose outputs may be on their way to the queue; then the engine waits, so that a slow queue bounds memory."""


class EngineThread:
    """Runs `engine.step` while there is work. Commands are applied between steps, in the order they were given."""

    def __init__(self, engine: Engine, max_unacked_steps: int = MAX_UNACKED_STEPS) -> None:
        self.engine = engine
        self._max_unacked = max_unacked_steps
        self._changed = threading.Condition()
        self._commands: list[Callable[[], object]] = []  # guarded by _changed, as the next three
        self._num_unacked = 0
        self._stopping = False
        self._dead = False
        self._can_step = False  # used by the engine's thread alone
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        engine.adapters.on_loaded = lambda: self._post(_nothing)

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

    def hand_over(self) -> Future[list[str]]:
        """Forget every request at the next step boundary; the result names them."""
        future: Future[list[str]] = Future()
        if not self._post(lambda: future.set_result(self.engine.hand_over())):
            future.cancel()
        return future

    def ack_step(self) -> None:
        """Say that the outputs of one step are durable."""
        with self._changed:
            self._num_unacked -= 1
            self._changed.notify()

    def stats(self) -> EngineStats:
        """Return the engine's figures as of its last step."""
        return self._stats

    def stop(self) -> None:
        """End the thread after its current step and wait for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _post(self, command: Callable[[], object]) -> bool:
        with self._changed:
            if self._dead:
                return False
            self._commands.append(command)
            self._changed.notify()
            return True

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._loop()
        except Exception as crash:  # the loop's edge: whoever gave this engine requests must hear of it
            logger.exception("the engine crashed")
            error = crash
        with self._changed:
            self._dead = True
            self._commands = []
        self.engine.adapters.close()
        if error is not None:
            self._on_death(error)

    def _has_work(self) -> bool:
        can_step = self._can_step and self._num_unacked < self._max_unacked
        return self._stopping or bool(self._commands) or can_step

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._stopping:
                    return
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            outputs: list[TokenOutput] = []
            self._can_step = True
            if self._num_unacked < self._max_unacked:
                outputs = self.engine.step()
                self._can_step = self.engine.can_step
            self._stats = self.engine.stats()
            if outputs:
                with self._changed:
                    self._num_unacked += 1
                self._on_outputs(outputs)


def _nothing() -> None:
    """Wake the loop."""
