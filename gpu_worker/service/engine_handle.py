"""The engine as the worker's service sees it. Imports no torch, so that the service starts without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from gpu_worker.engine.request import EngineRequest, EngineStats, TokenOutput
from protocol.wire.messages import AdapterEvent
from protocol.wire.records import AdapterUse

OnOutputs = Callable[[list[TokenOutput]], object]
"""Called in the engine's thread with what one step put out."""

OnDeath = Callable[[BaseException], object]
"""Called in the engine's thread with the error that ended it."""


class EngineHandle(Protocol):
    """An engine that runs in a thread of its own. All methods but `stop` return at once, from any thread.

    Commands are carried out between steps, in the order they were given, and ignored once the engine has ended.
    """

    @property
    def num_turns(self) -> int:
        """How often the thread has gone round. It does so at least once a second, but for a step that takes longer."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether the thread takes nothing more: it was stopped, or it has crashed and `on_death` is called."""
        ...

    def start(self, on_outputs: OnOutputs, on_death: OnDeath) -> None:
        """Start the thread. It calls `on_outputs` once per step that put anything out, `on_death` if it crashes."""
        ...

    def finish_start(self) -> None:
        """Make what the fleet need not wait for: the engine serves requests after that. It may be asked for again."""
        ...

    def submit(self, request: EngineRequest) -> None:
        """Give the engine a request. What is wrong with it comes out as its error."""
        ...

    def cancel(self, rids: Sequence[str]) -> None:
        """Forget requests; after the current step nothing more comes out for them."""
        ...

    def prefetch(self, digest: str) -> None:
        """Bring an adapter towards the pool, for a request that will come."""
        ...

    def pin(self, digest: str) -> None:
        """Keep an adapter in the pool from now on."""
        ...

    def unpin(self, digest: str) -> None:
        """Let an adapter leave the pool like any other."""
        ...

    def evict(self, digest: str, order: str) -> None:
        """Remove an adapter as soon as no request needs it. An event that repeats `order` tells what that freed."""
        ...

    def set_queued(self, digests: list[str]) -> None:
        """Say which adapters requests in the fleet's queue wait for: they leave the pool after all others."""
        ...

    def take_adapter_events(self) -> tuple[list[AdapterEvent], dict[str, AdapterUse]]:
        """Return what happened to adapters since the last call, and how they were used, by digest."""
        ...

    def room(self) -> Future[None]:
        """Return a future that is done once the engine's inbox has room for more commands, or the engine has ended.

        Commands are taken without it too: it is for a caller to wait for before it gives many.
        """
        ...

    def hand_over(self) -> Future[list[str]]:
        """Forget every request between two steps; the result names them. Empty if the engine has ended."""
        ...

    def ack_step(self) -> None:
        """Say that the outputs of one step are durable. The engine pauses while too many steps are not."""
        ...

    def stats(self) -> EngineStats:
        """Return the engine's figures of a moment ago."""
        ...

    def stop(self) -> None:
        """End the thread after its current step, and wait for it."""
        ...
