"""A worker without a model: the real service around an engine that emits tokens at a fixed rate.

It serves to measure and test the control plane alone. `python -m benchmarks.common.fake_worker --step-ms 25` joins a
fleet. Its output is a function of (prompt, position), so that any two workers continue each other's requests exactly.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from gpu_worker.engine.engine_thread import EngineThread, OnDeath, OnOutputs
from gpu_worker.engine.timelines import Timelines
from gpu_worker.planning.request import EngineRequest, TokenOutput
from gpu_worker.service.service import WorkerService
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.service import run, set_up_logging
from protocol.runtime.settings import Settings
from protocol.runtime.tracing import tracing
from protocol.wire import messages as m
from protocol.wire.messages import AdapterEvent
from protocol.wire.records import AdapterUse

MAX_UNACKED = 4
ADAPTER_BYTES = 1000


def expected_token(prompt: np.ndarray, position: int, vocab_size: int) -> int:
    """Return the token that a fake engine emits at an output position."""
    return int((int(prompt.sum()) * 31 + position * 7) % vocab_size)


@dataclass(slots=True)
class Running:
    """A request for which the engine emits tokens."""

    request: EngineRequest
    num_output: int
    first_token: int  # cached: numpy's sum per token would cost more than the rest of a step


class FakeEngine(EngineThread):
    """An engine thread without an engine: a step takes `step_s` and gives every request one token."""

    def __init__(self, *, step_s: float = 0.025, capacity: int = 256, vocab_size: int = 1000) -> None:
        self._step_s = step_s
        self._capacity = capacity
        self._vocab = vocab_size
        self._requests: dict[str, Running] = {}
        self._lock = threading.Lock()
        self._has_work = threading.Event()
        self._room = threading.Semaphore(MAX_UNACKED)
        self._stopped = False
        self.has_ended = False
        self.num_turns = 0
        self.steps = threading.Event()  # while cleared, no step runs
        self.steps.set()
        self.orders: list[tuple[str, str]] = []  # orders about adapters, as (order, digest)
        self._resident: set[str] = set()
        self._host: set[str] = set()
        self._pinned: dict[str, str] = {}
        self._leaving: dict[str, str] = {}  # digest -> order
        self._uses: dict[str, AdapterUse] = {}
        self._timelines = Timelines()

    def start(self, on_outputs: OnOutputs, on_death: OnDeath) -> None:
        """Start the thread that runs the steps."""
        threading.Thread(target=self._loop, args=(on_outputs,), name="fake-engine", daemon=True).start()

    def finish_start(self) -> None:
        """Do nothing: a fake engine has nothing to prepare."""

    def submit(self, request: EngineRequest) -> None:
        """Add a request."""
        with self._lock:
            first_token = expected_token(request.prompt, 0, self._vocab)
            self._requests[request.rid] = Running(request, len(request.output), first_token)
            tier = "resident" if request.digest in self._resident else "store" if request.digest else ""
            self._timelines.take(request, tier)
            if request.digest:
                use = self._uses.setdefault(request.digest, AdapterUse(last_ms=now_ms()))
                use.hits += request.digest in self._resident
                use.misses += request.digest not in self._resident
        if request.digest:
            self._bring(request.digest, self._host, self._resident)
        self._has_work.set()

    def cancel(self, rids: Sequence[str]) -> None:
        """Drop requests."""
        with self._lock:
            for rid in rids:
                self._requests.pop(rid, None)
                self._timelines.forget(rid)

    # ------------------------------------------------------------ adapters, which take neither time nor space here

    def _bring(self, digest: str, *tiers: set[str]) -> None:
        with self._lock:
            self._leaving.pop(digest, None)
            for tier in tiers:
                tier.add(digest)

    def prefetch(self, digest: str) -> None:
        """Record the order, and add the adapter to the host tier."""
        self.orders.append(("prefetch", digest))
        self._bring(digest, self._host)

    def pin(self, digest: str) -> None:
        """Record the order, and add the adapter to the pool as pinned."""
        self.orders.append(("pin", digest))
        self._bring(digest, self._host, self._resident)
        self._pinned[digest] = ""

    def unpin(self, digest: str) -> None:
        """Record the order, and unpin the adapter."""
        self.orders.append(("unpin", digest))
        self._pinned.pop(digest, None)

    def evict(self, digest: str, order: str) -> None:
        """Record an order to evict; it is done once no request uses the adapter."""
        self.orders.append(("evict", digest))
        self._leaving[digest] = order

    def set_queued(self, digests: list[str]) -> None:
        """Record which adapters the backlog waits for; no adapter is evicted because of it."""
        self.orders.append(("queued", ",".join(digests)))

    def take_adapter_events(self) -> tuple[list[AdapterEvent], dict[str, AdapterUse]]:
        """Return the adapter events since the last call, and the use of each adapter."""
        events: list[AdapterEvent] = []
        with self._lock:
            used = {running.request.digest for running in self._requests.values()}
            for digest in [digest for digest in self._leaving if digest not in used]:
                sizes = [ADAPTER_BYTES * (digest in tier) for tier in (self._resident, self._host)]
                order = self._leaving.pop(digest)
                events.append(
                    AdapterEvent(kind="evicted", digest=digest, order=order, pool_bytes=sizes[0], host_bytes=sizes[1])
                )
                self._resident.discard(digest)
                self._host.discard(digest)
            uses, self._uses = self._uses, {}
        return events, uses

    def room(self) -> Future[None]:
        """Return a completed future: commands never wait here."""
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def hand_over(self) -> Future[list[str]]:
        """Drop all requests; the future holds their ids."""
        done: Future[list[str]] = Future()
        with self._lock:
            rids = list(self._requests)
            self._requests.clear()
            self._timelines.clear()
        done.set_result(rids)
        return done

    def ack_step(self) -> None:
        """Allow another step, after a step became durable."""
        self._room.release()

    def stats(self) -> m.WorkerBeat:
        """Return the engine's fields of a heartbeat."""
        with self._lock:
            return m.WorkerBeat(
                wid="", name="", capacity=self._capacity, running=len(self._requests),
                resident=sorted(self._resident), host=sorted(self._host), pinned=dict(self._pinned),
            )  # fmt: skip

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped = True
        self.steps.set()
        self._has_work.set()

    def _loop(self, on_outputs: OnOutputs) -> None:
        next_step = time.perf_counter()
        while not self._stopped:
            self.num_turns += 1
            if not self._requests:
                self._has_work.wait()
                self._has_work.clear()
                next_step = time.perf_counter()
                continue
            next_step = max(next_step + self._step_s, time.perf_counter())
            time.sleep(max(0.0, next_step - time.perf_counter()))
            self._room.acquire()
            self.steps.wait()
            with self._lock:
                self._timelines.look(self._resident.__contains__, self._host)
                self._timelines.begin(self._requests)
                outputs = [self._advance(running) for running in list(self._requests.values())]
                self._timelines.tell(outputs)
            if outputs:
                on_outputs(outputs)
            else:  # all requests were handed over in the meantime
                self._room.release()

    def _advance(self, running: Running) -> TokenOutput:
        request = running.request
        seq0 = running.num_output
        running.num_output += 1
        finish = "length" if running.num_output >= request.max_new_tokens else ""
        if finish:
            del self._requests[request.rid]
        return TokenOutput(
            rid=request.rid,
            epoch=request.epoch,
            seq0=seq0,
            ids=[(running.first_token + seq0 * 7) % self._vocab],
            finish=finish,
        )


def fake_served(name: str = "fake", vocab_size: int = 1000) -> m.ServedModel:
    """Return the description of the model that a fake engine claims to run."""
    return m.ServedModel(
        model=name, name=name, fingerprint=f"fake:{vocab_size}", model_type="fake", vocab_size=vocab_size,
        max_model_len=100_000, sites=[],
    )  # fmt: skip


async def serve_fake(settings: Settings, engine: FakeEngine, served: m.ServedModel, stop: asyncio.Event) -> int:
    """Run the worker service around a fake engine; one process can run several of them."""
    bus = Bus(settings.queue_url())
    try:
        return await WorkerService(bus, engine, served, settings).run(stop)
    finally:
        engine.stop()
        await bus.close()


async def serve_many(args: argparse.Namespace, settings: Settings, stop: asyncio.Event) -> int:
    """Run `args.count` workers in this process."""
    served = fake_served(args.name, args.vocab_size)
    async with asyncio.TaskGroup() as group:
        for i in range(args.count):
            engine = FakeEngine(step_s=args.step_ms / 1e3, capacity=args.capacity, vocab_size=args.vocab_size)
            own = settings.model_copy(update={"worker_name": f"fake-{i}"})
            group.create_task(serve_fake(own, engine, served, stop))
    return 0


def main() -> int:
    """Run a fake worker until a signal ends it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--count", type=int, default=1, help="workers in this process")
    parser.add_argument("--name", default="fake")
    parser.add_argument("--vocab-size", type=int, default=1000)
    args = parser.parse_args()
    settings = Settings()
    set_up_logging("fake-worker", settings.log_level)
    with tracing(settings, "worker", f"{args.name}-workers"):
        return run(lambda stop: serve_many(args, settings, stop))


if __name__ == "__main__":
    sys.exit(main())
