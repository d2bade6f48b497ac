"""Decode and prefill tok/s of the engine, base and adapters, with and without recorded steps and overlap."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.shapes import RandomAdapters, Shape, names_of, pool_bytes, random_model
from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.model.model import BaseModel
from gpu_worker.planning.request import EngineRequest
from protocol.runtime.settings import Settings
from protocol.wire.messages import Sampling

LOAD_S = 120.0
"""Maximum seconds to wait for an adapter."""

GREEDY = Sampling(temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of one mix of sequences."""

    num_seqs: int
    num_adapters: int  # distinct adapters; 0: the base alone
    graphs: bool
    overlap: bool
    decode_tok_s: float
    prefill_tok_s: float
    step_ms: float  # duration of a decode step


def engine_of(shape: Shape, model: BaseModel, adapters: RandomAdapters, num_pages: int, **settings: Any) -> Engine:
    """Return a started engine whose pool holds `num_pages` pages."""
    values: dict[str, Any] = {
        "model": "random", "device": model.device.type, "adapter_pool_bytes": pool_bytes(model, num_pages),
        "max_num_seqs": max(shape.num_seqs), "max_step_tokens": shape.max_step_tokens, "prefix_cache": False,
        "max_model_len": min(shape.config["max_position_embeddings"], 4 * (shape.prompt_tokens + shape.stream_tokens)),
        "max_slowdown": 0.0, "max_batch_slowdown": 0.0,
    }  # fmt: skip
    return build_engine(model, Settings(**values | settings), adapters.fetch)[0]


def load(engine: Engine, names: Sequence[str]) -> None:
    """Load adapters into the pool. Raises TimeoutError, or the error of an adapter that cannot be loaded."""
    loaded = threading.Event()
    engine.wake_with(loaded.set)
    wanted = {name for name in names if name}
    for name in wanted:
        engine.prefetch(name)
    while not wanted <= set(engine.adapters.resident):
        if not loaded.wait(LOAD_S):
            raise TimeoutError(f"no adapter came within {LOAD_S:.0f} s")
        loaded.clear()
        for error in engine.adapters.poll().values():
            raise error


@contextmanager
def as_set(engine: Engine, *, graphs: bool, overlap: bool) -> Iterator[None]:
    """Run an engine with or without overlap, and with or without recorded steps, if it has any."""
    recorded, config = engine.runner.graphs, engine.config
    engine.runner.graphs = recorded if graphs else None
    engine.config = replace(config, overlaps=overlap)
    try:
        yield
    finally:
        engine.runner.graphs, engine.config = recorded, config


def _step(engine: Engine) -> int:
    """Run a step; return the number of tokens that it emitted. Raises the error of a request that failed."""
    outputs = engine.step()
    for output in outputs:
        if output.error is not None:
            raise output.error
    return sum(len(output.ids) for output in outputs)


def _add(engine: Engine, shape: Shape, num_seqs: int, names: Sequence[str], max_new_tokens: int) -> None:
    rng = np.random.default_rng()
    for i in range(num_seqs):
        prompt = rng.integers(shape.config["vocab_size"], size=shape.prompt_tokens).astype(np.int32)
        engine.add(EngineRequest(str(i), 1, names[i % len(names)], prompt, GREEDY, max_new_tokens))


def prefill_tok_s(engine: Engine, shape: Shape, num_seqs: int, names: Sequence[str]) -> float:
    """Return the prompt tokens computed per second; the time includes each sequence's first token."""
    _add(engine, shape, num_seqs, names, 1)
    started = time.perf_counter()
    while engine.has_work:
        _step(engine)
    return num_seqs * shape.prompt_tokens / (time.perf_counter() - started)


def decode_tok_s(engine: Engine, shape: Shape, num_seqs: int, names: Sequence[str]) -> tuple[float, float]:
    """Return the tokens per second while all sequences decode, and the ms of a step."""
    _add(engine, shape, num_seqs, names, shape.config["max_position_embeddings"])
    while len(engine.batcher.running) < num_seqs or any(seq.num_output < 2 for seq in engine.batcher.running):
        _step(engine)
    started = time.perf_counter()
    num_tokens = sum(_step(engine) for _ in range(shape.decode_steps))
    seconds = time.perf_counter() - started
    engine.hand_over()
    assert num_tokens == num_seqs * shape.decode_steps, "a step left a sequence out"
    return num_tokens / seconds, 1e3 * seconds / shape.decode_steps


def measure(engine: Engine, shape: Shape, case: Speed) -> Speed:
    """Measure a case once."""
    names = names_of(case.num_adapters)
    with as_set(engine, graphs=case.graphs, overlap=case.overlap):
        prefill = prefill_tok_s(engine, shape, case.num_seqs, names)
        decode, step_ms = decode_tok_s(engine, shape, case.num_seqs, names)
    return replace(case, decode_tok_s=decode, prefill_tok_s=prefill, step_ms=step_ms)


def cases(shape: Shape, *, has_graphs: bool, overlaps: bool, most_adapters: int) -> list[Speed]:
    """Return the cases: every mix with the served settings, and two mixes with all settings."""
    mixes = [
        (num_seqs, num)
        for num_seqs in shape.num_seqs
        for num in (0, *shape.num_adapters)
        if num <= min(num_seqs, most_adapters)
    ]
    found = [Speed(num_seqs, num, has_graphs, overlaps, 0, 0, 0) for num_seqs, num in mixes]
    fewest = shape.num_seqs[0]
    for num in {0, max(num for num_seqs, num in mixes if num_seqs == fewest)}:
        for graphs in {has_graphs, False}:
            for overlap in (True, False):
                case = Speed(fewest, num, graphs, overlap, 0, 0, 0)
                if case not in found:
                    found.append(case)
    return found


def run(shape: Shape, device: torch.device, deadline_s: float) -> dict[str, Any]:
    """Return the speed of every case: the median of the rounds that fit before `deadline_s`, by time.monotonic.

    The first round, which warms up every case, is not counted if there are others.
    """
    model, adapters = random_model(shape, device), RandomAdapters(shape)
    most = _most_adapters(shape, model, adapters)
    engine = engine_of(shape, model, adapters, adapters.num_pages(names_of(most)))
    load(engine, names_of(most))
    wanted = cases(
        shape, has_graphs=engine.runner.graphs is not None, overlaps=engine.config.overlaps, most_adapters=most
    )
    rounds: list[list[Speed]] = []
    longest_s = 0.0
    while len(rounds) <= shape.rounds and (not rounds or time.monotonic() + 1.2 * longest_s < deadline_s):
        started = time.monotonic()
        rounds.append([measure(engine, shape, case) for case in wanted])
        longest_s = max(longest_s, time.monotonic() - started)
    counted = rounds[1:] or rounds
    medians = [
        replace(
            case,
            decode_tok_s=float(np.median([done[i].decode_tok_s for done in counted])),
            prefill_tok_s=float(np.median([done[i].prefill_tok_s for done in counted])),
            step_ms=float(np.median([done[i].step_ms for done in counted])),
        )
        for i, case in enumerate(wanted)
    ]
    return {
        "num_rounds": len(counted), "most_adapters": most, "has_graphs": engine.runner.graphs is not None,
        "pool_bytes": engine.adapters.pool.total_bytes, "kv_blocks": engine.config.num_blocks,
        "cases": [asdict(speed) for speed in medians],
    }  # fmt: skip


def _most_adapters(shape: Shape, model: BaseModel, adapters: RandomAdapters) -> int:
    """Return the maximum number of adapters that leaves a GPU enough memory for the KV cache of all sequences."""
    if model.device.type == "cpu":
        return max(shape.num_adapters)
    num_tokens = max(shape.num_seqs) * (shape.prompt_tokens + 4 * shape.decode_steps)
    kv = num_tokens * sum(layer.block_bytes(model.dtype) for layer in model.layers) // 16
    free, total = torch.cuda.mem_get_info(model.device)
    room = free - total // 10 - kv - (6 << 30)  # reserves memory for the largest steps and their recordings
    fitting = [n for n in shape.num_adapters if pool_bytes(model, adapters.num_pages(names_of(n))) < room]
    return max(fitting, default=min(shape.num_adapters))
