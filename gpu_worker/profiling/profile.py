"""Where an engine's steps spend their time: phases in normal operation, then operations with one call per layer.

For `lorafleet profile`, which prints the result; `docs/engine.md` explains how to read it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.adapters.packing.packer import name_of
from gpu_worker.build import load_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.runner import StepInputs
from gpu_worker.layers.blocks import stacks_of
from gpu_worker.profiling.steps import Decode, Prefill, Queue
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE, parse_config
from protocol.metrics.series import PHASES
from protocol.runtime.settings import BLOCK_TOKENS, Settings
from protocol.wire.errors import BadRequest, Internal

NUM_WARM_STEPS = 3
"""Unmeasured steps at the start."""

MAX_WATCHED_STEPS = 10
"""Maximum steps that run under torch's profiler."""

LOAD_S = 600.0
"""Maximum seconds to wait for one adapter."""

FORWARD = "lorafleet: forward"
"""The profiler's name of a whole forward pass."""

OPERATIONS = {
    "lorafleet::linear": "linear",
    "lorafleet::quant_linear": "linear",
    "aten::linear": "linear",
    "lorafleet::grouped_linear": "experts",
    "lorafleet::experts": "experts",
    "lorafleet::lora_add_": "lora",
    "lorafleet::paged_attention": "attention",
    "lorafleet::kv_write_": "kv write",
    "lorafleet::rms_norm": "norm",
    "lorafleet::rotary_": "rotary",
    "lorafleet::gated_act": "activation",
    "lorafleet::gate_heads_": "activation",
    "lorafleet::gated_delta": "delta rule",
    "lorafleet::delta_rule": "delta rule",
    "lorafleet::causal_conv": "convolution",
}
"""Names in torch's profiler -> ours; other operations keep torch's names."""

OnProgress = Callable[[str, int, int], object]
"""Progress callback: current activity, amount done, total amount; 0 of 0 if unknown."""


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """What to measure."""

    num_sequences: tuple[int, ...]
    num_steps: int
    prompt_tokens: int
    adapters: Path | None = None  # folder whose subfolders are adapters
    trace: Path | None = None  # path for chrome traces, one per case: NAME-decode-8.json


@dataclass(frozen=True, slots=True)
class TimedOperation:
    """One kind of operation in a step's forward pass, on average."""

    name: str
    calls: float
    ms: float


@dataclass(frozen=True, slots=True)
class ProfileCase:
    """Measurements of steps of one kind. Times are averages per step."""

    kind: str  # decode or prefill
    num_sequences: int
    num_adapters: int  # distinct adapters among the sequences
    num_steps: int
    tokens: float
    step_ms: float  # time until the next step can begin: all phases except publish, which overlaps it
    phases_ms: dict[str, float]
    forward_ms: float  # under the profiler: one call per layer, plus overhead
    operations: list[
        TimedOperation
    ]  # profiled operations, longest first; the rest of forward_ms is Python between them


@dataclass(frozen=True, slots=True)
class StepProfile:
    """The result of a whole run."""

    model: str
    dtype: str
    device: str
    num_threads: int
    num_layers: int
    num_stacked: int  # layers that otherwise run as one native call
    adapters: list[str]
    prompt_tokens: int
    kv_tokens: int  # capacity of the KV cache
    kv_dtype: str
    cases: list[ProfileCase]


def run_profile(settings: Settings, plan: ProfilePlan, on_progress: OnProgress) -> StepProfile:
    """Load the model and measure. Takes seconds to minutes. Raises LorafleetError.

    settings.redis_url must be a queue without other users.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints when it starts and stops
    folders = adapter_folders(plan.adapters)
    on_progress(f"loading {settings.model}", 0, 0)
    thread, served = load_engine(settings, lambda name: read_files(folders[name]))
    engine = thread.engine
    if not isinstance(engine, Engine):
        raise BadRequest(f"{settings.model} is an encoder; only models that generate text are measured")
    queue = Queue(settings.queue_url())
    try:
        names = load_adapters(engine, list(folders)[: max(plan.num_sequences)], on_progress)
        stacks = [stack for stack in stacks_of(engine.model.module) if stack.native() is not None]
        return StepProfile(
            model=served.name, dtype=served.dtype, device=str(engine.model.device), adapters=names,
            num_threads=torch.get_num_threads(), num_layers=engine.model.config.num_hidden_layers,
            num_stacked=sum(len(stack.layers) for stack in stacks), prompt_tokens=plan.prompt_tokens,
            kv_tokens=engine.config.num_blocks * BLOCK_TOKENS, kv_dtype=name_of(engine.model.cache_dtype),
            cases=list(_cases(engine, queue, [*names, ""], plan, on_progress)),
        )  # fmt: skip
    finally:
        queue.close()
        thread.stop()
        engine.adapters.close()


def adapter_folders(root: Path | None) -> dict[str, Path]:
    """Return the adapters in a folder, by name. Raises BadRequest if there are none."""
    if root is None:
        return {}
    found = {path.parent.name: path.parent for path in sorted(root.glob(f"*/{CONFIG_FILE}"))}
    if not found:
        raise BadRequest(f"--adapters: no sub-folder of {root} holds an {CONFIG_FILE}")
    return found


def read_files(folder: Path) -> FetchedAdapter:
    """Read an adapter's files. Raises AdapterRefused, BadRequest."""
    try:
        return FetchedAdapter(parse_config((folder / CONFIG_FILE).read_bytes()), (folder / WEIGHTS_FILE).read_bytes())
    except OSError as error:
        raise BadRequest(f"{error.filename}: {error.strerror}") from error


def load_adapters(engine: Engine, names: Sequence[str], on_progress: OnProgress) -> list[str]:
    """Load adapters into the pool; return their names.

    Raises LorafleetError if one cannot be loaded or does not fit.
    """
    cache, arrived = engine.adapters, threading.Event()
    cache.on_loaded = arrived.set
    for name in names:
        engine.prefetch(name)
    while len(cache.resident) < len(names):
        on_progress("loading adapters", len(cache.resident), len(names))
        if not cache.loading:
            holds = f"holds {len(cache.resident)} of the {len(names)} adapters that the largest batch mixes"
            raise BadRequest(f"adapter_pool_bytes is {cache.pool.total_bytes} and {holds}")
        if not arrived.wait(LOAD_S):
            raise Internal(f"no adapter arrived within {LOAD_S:.0f} s")
        arrived.clear()
        for error in cache.poll().values():
            raise error
    return list(names)


def _cases(
    engine: Engine, queue: Queue, names: Sequence[str], plan: ProfilePlan, on_progress: OnProgress
) -> Iterator[ProfileCase]:
    num_steps = 2 + NUM_WARM_STEPS + plan.num_steps + MAX_WATCHED_STEPS
    cases = [
        kind(engine, queue, [names[i % len(names)] for i in range(number)], plan.prompt_tokens)
        for number in plan.num_sequences
        for kind in (Decode, Prefill)
    ]
    for steps in cases:
        steps.check_room(num_steps)
    for i, steps in enumerate(cases):
        on_progress(f"{steps.kind} at {steps.num_sequences}", i, len(cases))
        yield _measure(steps, plan)


def _measure(steps: Decode, plan: ProfilePlan) -> ProfileCase:
    steps.start()
    steps.run(NUM_WARM_STEPS)
    before = _totals(steps)
    steps.run(plan.num_steps)
    after = _totals(steps)
    with _layer_by_layer(steps.engine):
        steps.run(1)
        profiler = _record(steps, min(plan.num_steps, MAX_WATCHED_STEPS))
    steps.end()
    if plan.trace is not None:
        plan.trace.parent.mkdir(parents=True, exist_ok=True)
        stem = f"{plan.trace.stem}-{steps.kind}-{steps.num_sequences}"
        profiler.export_chrome_trace(str(plan.trace.with_stem(stem)))
    spent = {name: after[name] - before[name] for name in after}
    num_run = round(spent["steps"])
    phases_ms = {name: 1000 * spent[name] / num_run for name in PHASES}
    operations, forward_ms = _operations(profiler, on_device=steps.engine.model.device.type == "cuda")
    return ProfileCase(
        kind=steps.kind, num_sequences=steps.num_sequences, num_adapters=len(set(steps.names) - {""}),
        num_steps=num_run, tokens=spent["tokens"] / num_run, step_ms=sum(phases_ms.values()) - phases_ms["publish"],
        phases_ms=phases_ms, forward_ms=forward_ms, operations=operations,
    )  # fmt: skip


def _totals(steps: Decode) -> dict[str, float]:
    counters = steps.engine.counters
    phases = {name: float(getattr(counters, f"{name}_s")) for name in PHASES}
    phases["publish"] = steps.queue.publish_s
    return {"steps": counters.num_steps, "tokens": counters.num_computed_tokens, **phases}


@contextmanager
def _layer_by_layer(engine: Engine) -> Iterator[None]:
    """Run each stacked layer in its own call, and mark the beginning and end of forward passes."""
    run, stacks = engine.runner.run, stacks_of(engine.model.module)

    def marked(inputs: StepInputs) -> Tensor:
        with record_function(FORWARD):
            return run(inputs)

    engine.runner.run = marked
    for stack in stacks:
        stack.one_call = False
    try:
        yield
    finally:
        engine.runner.run = run
        for stack in stacks:
            stack.one_call = True


def _record(steps: Decode, num_steps: int) -> profile:
    """Run steps under torch's profiler and return it."""
    on_device = steps.engine.model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        steps.run(num_steps)
    return profiler


def _operations(profiler: profile, *, on_device: bool) -> tuple[list[TimedOperation], float]:
    """Return the operations of an average forward pass, longest first, and its milliseconds.

    On a GPU the operations are kernels, from any part of the step.
    """
    events = profiler.events()
    assert events is not None
    passes = [event for event in events if event.name == FORWARD and event.device_type.name == "CPU"]
    if on_device:
        parts = [event for event in events if event.device_type.name == "CUDA" and event.name != FORWARD]
    else:
        parts = [child for event in passes for child in event.cpu_children]
    times: dict[str, list[float]] = {}
    for event in parts:
        name = str(event.name)
        times.setdefault(OPERATIONS.get(name, name), []).append(event.time_range.elapsed_us() / 1000)
    num = len(passes)
    found = [TimedOperation(name, len(each) / num, sum(each) / num) for name, each in times.items()]
    forward_ms = sum(event.time_range.elapsed_us() for event in passes) / 1000 / num
    return sorted(found, key=lambda operation: -operation.ms), forward_ms
