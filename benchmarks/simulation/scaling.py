"""A day of autoscaled workers: their cost, and the time to first token.

`python -m benchmarks.simulation.scaling`. Simulated in steps of a second without a model; seeded, so every run gives
the same numbers. The load rises and falls over the day, with twelve bursts of five minutes at twice the rate. Workers
are scaled as by the Helm chart's ScaledObject: one for each `target` requests that wait or run, checked every 15 s (the
autoscaler's period). Scaling up is immediate; scaling down removes one worker per minute, down to the maximum wanted in
the last five minutes. A worker serves after its start time, and drains before it stops. *With a schedule*, there are at
least as many workers as the same quarter of an hour wanted yesterday with instant starts, or twice as many with *room*;
they start early enough to be ready in time. KEDA's cron triggers do that.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from benchmarks.common import report

DAY_S = 86_400
LOOK_S, DOWN_WINDOW_S, DOWN_EVERY_S = 15, 300, 60
TOLERANCE = 0.1
"""Deviation from the target within which the autoscaler does nothing."""
SLOT_S = 900
NUM_BURSTS, BURST_S = 12, 300
MAX_WORKERS = 40
TARGETS = (16, 32, 64)
WAYS = (("demand", 0.0), ("a schedule too", 1.0), ("with room", 2.0))
"""How workers are scaled, and the factor on yesterday's number."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of worker: its number of slots; a step with n requests takes a + b n seconds."""

    name: str
    places: int
    a: float
    b: float
    prompt_s: float  # per prompt
    peak_rate: float  # requests per second at midday, so that about eight workers are busy


KINDS = (
    Kind("two CPU cores, 135 M", 64, 0.010, 0.0012, 0.08, 14.0),
    Kind("one GPU, 8 B", 64, 0.018, 0.0004, 0.05, 64.0),
)


@dataclass(slots=True)
class Worker:
    """A worker that serves from `ready_s` on. left: tokens that each request still needs, float64 [requests]."""

    ready_s: int
    left: np.ndarray = field(default_factory=lambda: np.empty(0))
    leaves: bool = False


@dataclass(slots=True)
class Outcome:
    """The result of a day."""

    worker_hours: float
    most_workers: int
    first_token_s: np.ndarray  # per request, float64 [requests]
    demand: np.ndarray  # requests that waited or ran, int64 [seconds]


def arrivals(rate: float, random: np.random.Generator) -> np.ndarray:
    """Return the number of requests that arrive in each second of a day, int64 [seconds]."""
    at = np.arange(DAY_S)
    rates = rate * (0.1 + 0.9 * np.sin(np.pi * ((at / DAY_S - 0.15) % 1)) ** 2)
    for start in random.integers(0, DAY_S - BURST_S, NUM_BURSTS):
        rates[start : start + BURST_S] *= 2
    return random.poisson(rates)


def wanted(demand: int, target: int, now: int) -> int:
    """Return the number of workers that the autoscaler wants when it has `now`."""
    ratio = demand / (target * max(1, now))
    return now if now and abs(ratio - 1) <= TOLERANCE else max(1, math.ceil(demand / target))


def live(
    kind: Kind, target: int, start_s: int, coming: np.ndarray, random: np.random.Generator,
    schedule: np.ndarray | None = None,
) -> Outcome:  # fmt: skip
    """Play a day. schedule: minimum number of workers in each slot of the day."""
    workers = [Worker(0)]
    waiting: deque[int] = deque()
    first: list[float] = []
    demand = np.zeros(DAY_S, np.int64)
    wants: deque[int] = deque(maxlen=DOWN_WINDOW_S // LOOK_S)
    busy_s, most, last_down_s = 0, 1, 0
    for now in range(DAY_S):
        waiting.extend([now] * int(coming[now]))
        serving = [worker for worker in workers if worker.ready_s <= now and not worker.leaves]
        while waiting and serving:
            worker = min(serving, key=lambda one: len(one.left))
            if len(worker.left) >= kind.places:
                break
            num = min(len(waiting), max(1, kind.places - len(worker.left)), 4)
            for _ in range(num):
                first.append(now - waiting.popleft() + kind.a + kind.b * len(worker.left) + kind.prompt_s)
            worker.left = np.append(worker.left, random.lognormal(4.6, 0.8, num))
        for worker in workers:
            if len(worker.left):
                worker.left = worker.left - 1 / (kind.a + kind.b * len(worker.left))
                worker.left = worker.left[worker.left > 0]
        workers = [worker for worker in workers if not (worker.leaves and not len(worker.left))]
        demand[now] = len(waiting) + sum(len(worker.left) for worker in workers)
        busy_s += len(workers)
        if now % LOOK_S:
            continue
        here = [worker for worker in workers if not worker.leaves]
        least = 1 if schedule is None else int(schedule[min(now + start_s, DAY_S - 1) // SLOT_S])
        wants.append(min(MAX_WORKERS, max(least, wanted(int(demand[now]), target, len(here)))))
        workers += [Worker(now + start_s) for _ in range(wants[-1] - len(here))]
        if len(here) > max(wants) and now - last_down_s >= DOWN_EVERY_S:
            min(here, key=lambda one: (one.ready_s <= now, len(one.left))).leaves = True
            last_down_s = now
        most = max(most, len(workers))
    return Outcome(busy_s / 3600, most, np.array(first), demand)


def scheduled(yesterday: Outcome, target: int, room: float) -> np.ndarray:
    """Return the workers that each slot of the day wanted in its median second, times `room`: int64 [slots]."""
    slots = room * np.median(yesterday.demand.reshape(-1, SLOT_S), axis=1)
    return np.clip(np.ceil(slots / target), 1, MAX_WORKERS).astype(np.int64)


def row(kind: Kind, target: int, start_s: int, how: str, outcome: Outcome) -> dict[str, Any]:
    """Return the reported figures of a day."""
    p50, p99 = np.quantile(outcome.first_token_s, (0.5, 0.99))
    return {
        "kind": kind.name, "target": target, "start_s": start_s, "how": how,
        "worker_hours": round(outcome.worker_hours, 1), "most": outcome.most_workers,
        "ttft_p50_s": round(float(p50), 2), "ttft_p99_s": round(float(p99), 2),
        "late": round(float((outcome.first_token_s > 5).mean()) * 100, 2), "requests": len(outcome.first_token_s),
    }  # fmt: skip


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw worker hours against p99, one panel per kind, with one line through the targets per way and start time."""
    for panel, kind in zip(axes, KINDS, strict=True):
        for start_s, style in ((60, "-"), (300, "--")):
            for (how, _), color in zip(WAYS, (report.BLUE, report.GREEN, report.ORANGE), strict=True):
                own = [r for r in rows if (r["kind"], r["start_s"], r["how"]) == (kind.name, start_s, how)]
                hours, late = [r["worker_hours"] for r in own], [r["ttft_p99_s"] for r in own]
                panel.plot(hours, late, f"o{style}", color=color, label=f"{start_s} s to start, {how}")
                for r, x, y in zip(own, hours, late, strict=True):
                    panel.annotate(str(r["target"]), (x, y), fontsize=7)
        panel.set(title=kind.name, xlabel="worker hours a day", ylabel="p99 to first token, s", yscale="log")
    axes[0].legend(fontsize=6)


def main() -> None:
    """Play the days and report them."""
    args = report.parser(__doc__, without=("model", "short")).parse_args()
    about = report.machine()
    rows: list[dict[str, Any]] = []
    for kind, start_s, target in product(KINDS, (60, 300), TARGETS):
        before, coming = (arrivals(kind.peak_rate, np.random.default_rng(seed)) for seed in (1, 2))
        yesterday = live(kind, target, 0, before, np.random.default_rng(3))
        rows.append(row(kind, target, start_s, "demand", live(kind, target, start_s, coming, np.random.default_rng(4))))
        for how, room in WAYS[1:]:
            plan = scheduled(yesterday, target, room)
            day = live(kind, target, start_s, coming, np.random.default_rng(4), plan)
            rows.append(row(kind, target, start_s, how, day))
    header = ("worker", "starts in, s", "target", "by", "worker hours", "most", "TTFT p50, s", "p99, s", "% over 5 s")
    keys = ("kind", "start_s", "target", "how", "worker_hours", "most", "ttft_p50_s", "ttft_p99_s", "late")
    print(report.table(header, [[r[key] for key in keys] for r in rows]))
    report.save(args.out / "scaling", {**about, "rows": rows})
    report.plot(args.out / "scaling", len(KINDS), lambda axes: draw(axes, rows))


if __name__ == "__main__":
    main()
