"""The effect of adapter loads on users: more adapters than slots, and cold adapters while others stream."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.shapes import RandomAdapters, Shape, equal_names, random_model
from benchmarks.gpu.steps import GREEDY, engine_of
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.engine_thread import EngineThread
from gpu_worker.planning.request import EngineRequest, TokenOutput

WAIT_S = 120.0
"""Maximum seconds without output from the engine."""

SHORT_TOKENS = 2
"""Output of a request whose adapter is loaded while others stream."""


@dataclass(slots=True)
class Asked:
    """One request: when it was submitted, and when each of its tokens arrived."""

    submitted_s: float
    arrivals_s: list[float] = field(default_factory=list[float])
    is_done: bool = False

    @property
    def ttft_ms(self) -> float:
        """Milliseconds until its first token."""
        return 1e3 * (self.arrivals_s[0] - self.submitted_s)

    @property
    def gaps_ms(self) -> np.ndarray:
        """Milliseconds between its tokens: float64."""
        return 1e3 * np.diff(self.arrivals_s)


class Client:
    """Sends requests to an engine in its thread, as a worker's service does, and records when tokens arrive."""

    def __init__(self, engine: Engine, shape: Shape) -> None:
        self._thread, self._shape = EngineThread(engine), shape
        self._come: queue.SimpleQueue[tuple[float, list[TokenOutput]] | BaseException] = queue.SimpleQueue()
        self._rng, self._numbers = np.random.default_rng(0), itertools.count()
        self.asked: dict[str, Asked] = {}
        self._thread.start(self._take, self._come.put)

    def _take(self, outputs: list[TokenOutput]) -> None:
        self._come.put((time.perf_counter(), outputs))
        self._thread.ack_step()

    def ask(self, name: str, num_tokens: int) -> str:
        """Request an answer of `num_tokens` tokens; return the request's id."""
        rid, size = f"{name}/{next(self._numbers)}", self._shape.prompt_tokens // 4
        prompt = self._rng.integers(self._shape.config["vocab_size"], size=size).astype(np.int32)
        self.asked[rid] = Asked(time.perf_counter())
        self._thread.submit(EngineRequest(rid, 1, name, prompt, GREEDY, num_tokens))
        return rid

    def wait(self, until_s: float = float("inf")) -> list[str]:
        """Process the next outputs; return the ids of the requests that end with them. until_s: on time.perf_counter.

        Raises a request's error, the engine's fatal error, and TimeoutError.
        """
        left = until_s - time.perf_counter()
        if left <= 0:
            return []
        try:
            come = self._come.get(timeout=min(left, WAIT_S))
        except queue.Empty:
            if left > WAIT_S:
                raise TimeoutError(f"the engine was silent for {WAIT_S:.0f} s") from None
            return []
        if isinstance(come, BaseException):
            raise come
        now_s, outputs = come
        for output in outputs:
            if output.error is not None:
                raise output.error
            asked = self.asked[output.rid]
            asked.arrivals_s += [now_s] * len(output.ids)
            asked.is_done = bool(output.finish)
        return [output.rid for output in outputs if output.finish]

    def finish(self, rids: Sequence[str]) -> list[Asked]:
        """Wait until these requests have ended; return them."""
        while not all(self.asked[rid].is_done for rid in rids):
            self.wait()
        return [self.asked[rid] for rid in rids]

    def close(self) -> None:
        """Stop the engine."""
        self._thread.stop()


def closed_loop(client: Client, names: Iterator[str], num_requests: int, num_at_once: int) -> list[Asked]:
    """Keep `num_at_once` requests in flight until `num_requests` were sent; return all of them."""
    rids = [client.ask(next(names), 32) for _ in range(min(num_at_once, num_requests))]
    while len(rids) < num_requests:
        ended = client.wait()
        rids += [client.ask(next(names), 32) for _ in ended[: num_requests - len(rids)]]
    return client.finish(rids)


def drawn(names: Sequence[str]) -> Iterator[str]:
    """Yield names at random with equal probability."""
    rng = np.random.default_rng(1)
    while True:
        yield names[int(rng.integers(len(names)))]


def churn(client: Client, shape: Shape) -> dict[str, dict[str, float]]:
    """Return times to first token with as many adapters as the pool holds, and with twice as many."""
    found: dict[str, dict[str, float]] = {}
    for factor in (1, 2):
        names = equal_names(factor * shape.num_slots, "churn")
        closed_loop(client, itertools.cycle(names), len(names), shape.num_slots)  # loads them into the host tier
        asked = closed_loop(client, drawn(names), shape.num_requests, shape.num_slots)
        ttft = [one.ttft_ms for one in asked]
        found[f"{len(names)} adapters"] = {
            "ttft_p50_ms": float(np.median(ttft)), "ttft_p99_ms": float(np.percentile(ttft, 99)),
            "ttft_max_ms": max(ttft),
        }  # fmt: skip
    return found


def beside(client: Client, shape: Shape, warm: Sequence[str], others: Iterator[str] | None) -> tuple[np.ndarray, int]:
    """Return the gaps of long streams in ms during short requests for `others`, and the number of those requests."""
    streams = [client.ask(name, shape.stream_tokens) for name in warm]
    shorts: list[str] = []
    next_s = time.perf_counter()
    while not all(client.asked[rid].is_done for rid in streams):
        if others is not None and time.perf_counter() >= next_s:
            shorts.append(client.ask(next(others), SHORT_TOKENS))
            next_s += 1 / shape.cold_per_s
        client.wait(next_s if others is not None else float("inf"))
    client.finish(shorts)
    return np.concatenate([client.asked[rid].gaps_ms for rid in streams]), len(shorts)


def isolation(client: Client, shape: Shape) -> dict[str, dict[str, float]]:
    """Return the gaps of warm streams alone, during requests for a resident adapter, and during those for cold ones."""
    half = shape.num_slots // 2
    warm, resident = equal_names(half, "warm"), equal_names(1, "resident")
    client.finish([client.ask(name, SHORT_TOKENS) for name in (*warm, *resident)])
    cold = (f"cold-{i}-r16" for i in itertools.count())
    found: dict[str, list[np.ndarray]] = {"alone": [], "beside resident": [], "beside cold": []}
    asked = dict.fromkeys(found, 0)
    for _ in range(max(1, shape.rounds - 1)):
        for name, others in (("alone", None), ("beside resident", itertools.cycle(resident)), ("beside cold", cold)):
            gaps, num = beside(client, shape, warm, others)
            found[name].append(gaps)
            asked[name] += num
    figures: dict[str, dict[str, float]] = {}
    for name, parts in found.items():
        gaps = np.concatenate(parts)
        quantiles = {f"p{q:g}_ms": float(np.percentile(gaps, q)) for q in (50, 99, 99.9)}
        figures[name] = {**quantiles, "max_ms": float(gaps.max()), "num_others": asked[name]}
    return figures


def run(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the effect of churn on times to first token, and of cold loads on the gaps of streams."""
    model, adapters = random_model(shape, device), RandomAdapters(shape)
    for name in equal_names(1, "churn"):
        adapters.fetch(name)  # generates the weights before the measurement
    engine = engine_of(shape, model, adapters, shape.num_slots, adapter_host_bytes=8 << 30)
    client = Client(engine, shape)
    try:
        return {"num_slots": shape.num_slots, "churn": churn(client, shape), "isolation": isolation(client, shape)}
    finally:
        client.close()
