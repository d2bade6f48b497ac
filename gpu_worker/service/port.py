"""The engine as the worker's asyncio side sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from gpu_worker.engine.request import EngineRequest, EngineStats, TokenOutput
from protocol.wire.messages import AdapterEvent
from protocol.wire.records import AdapterUse

OnOutputs = Callable[[list[TokenOutput]], object]
OnDeath = Callable[[BaseException | None], object]


class EnginePort(Protocol):
    """What the service needs of an engine. All methods return at once and may be called from any thread."""

    def start(self, on_outputs: OnOutputs, on_death: OnDeath) -> None:
        """Start the thread. It calls `on_outputs` once per step that made tokens or ends, `on_death` if it crashes."""
        ...

    def submit(self, request: EngineRequest) -> None: ...

    def cancel(self, rids: Sequence[str]) -> None:
        """Forget requests; nothing more comes out for them."""
        ...

    def prefetch(self, digest: str) -> None:
        """Bring an adapter towards the pool, for a request that will come."""
        ...

    def pin(self, digest: str) -> None:
        """Keep an adapter in the pool from now on."""
        ...

    def unpin(self, digest: str) -> None: ...

    def evict(self, digest: str, order: str) -> None:
        """Send an adapter away as soon as nobody uses it; an event that repeats `order` tells what that freed."""
        ...

    def set_queued(self, digests: list[str]) -> None:
        """Say which adapters requests in the fleet's queue wait for: they leave after all others."""
        ...

    def take_news(self) -> tuple[list[AdapterEvent], dict[str, AdapterUse]]:
        """Return what happened to adapters since the last call, and how they were used."""
        ...

    def hand_over(self) -> Future[list[str]]:
        """Stop at the next step boundary and forget every request; the result names them."""
        ...

    def ack_step(self) -> None:
        """Say that one delivered step is durable; the engine pauses when too many are not."""
        ...

    def stats(self) -> EngineStats: ...

    def stop(self) -> None:
        """End the thread."""
        ...
