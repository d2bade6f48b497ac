"""The accuracy with which the simulation predicts a real fleet on this machine.

    python -m benchmarks.fleet.prediction [--model FOLDER] [--short]

A fleet of one worker and 32 adapters gets requests at Poisson times, in two loads below and one above its capacity. The
simulation then gets the same requests at the same times, with the step-time model that the worker had fitted before the
load, the sizes it reported, and the time that single requests took outside their steps ("foretold"). Nothing is fitted
to the predicted figures. It runs again with the model that the worker had fitted by the end of the load ("replayed"),
as one would to try another policy on a recorded trace; the difference is due to changes of the machine's speed. A third
run has steps that all take 2.5 % longer: if that changes a figure by half, two real runs would not agree on it either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from benchmarks.common import report
from benchmarks.common.fleet import (
    RunningFleet,
    Setup,
    adapter_bytes,
    fleet,
    make_adapters,
    quickstart_model,
    scratch_folder,
)
from benchmarks.simulation.load import FAR_AHEAD_MS
from benchmarks.simulation.policies import POLICIES, make_dispatcher
from benchmarks.simulation.run import Arrival, Simulation
from benchmarks.simulation.worker import WorkerModel
from lorafleet.bench import BenchConfig, BenchResult, BenchTarget, run_bench
from protocol.wire import messages as m
from protocol.wire.keys import INTERACTIVE
from scheduler.config import SchedulerConfig
from scheduler.placement import AdapterFacts, Bandwidths

NAMES = [f"adapter-{index}" for index in range(32)]
RANK = 16
PROMPT_WORDS, OUTPUT_TOKENS = 64, 64
SHARES = {"half of capacity": 0.5, "0.8 of capacity": 0.8, "1.25 × capacity": 1.25}
"""The load as a multiple of the requests per second that the fleet completes with CONCURRENCY in flight."""

AT_ONCE = Bandwidths(host=1e12, remote=1e12, host_ms=0, remote_ms=0)  # all adapters are resident before the load
RAMP = (64, 32, 8, 2)
"""Requests in flight, twice each, from which the worker fits the time of steps of different sizes."""

REHEARSAL_S = 60
"""Seconds of a load like the measured one, with other requests at other times, from which the worker fits the time of
decode steps with one or two prompts. Nearly all of the 500 steps that the fit remembers are of this kind."""

SIMULATED = {"foretold": report.BLUE, "replayed": report.ORANGE}
SLOWER = 1.025
CONCURRENCY = 32  # of the load that measures the fleet's capacity
NUM_ALONE = 20
STEP_TOKENS = 512  # the maximum of a worker on a CPU, see the setting max_step_tokens


def config(url: str, **fields: Any) -> BenchConfig:
    """Return a load of all adapters with Zipf popularity."""
    targets = tuple(BenchTarget.model(name) for name in NAMES)
    return BenchConfig(
        url=url, targets=targets, zipf_s=1.0, prompt_words=PROMPT_WORDS, output_tokens=OUTPUT_TOKENS, **fields
    )


def trace(result: BenchResult) -> list[Arrival]:
    """Return the requests of a run as arrivals for the simulation. Raises RuntimeError if some failed."""
    if result.errors:
        raise RuntimeError(f"requests failed: {result.errors}")
    records = sorted(result.records, key=lambda record: record.start_s)
    arrivals: list[Arrival] = []
    for number, record in enumerate(records):
        submit = m.RequestHead(
            rid=f"r{number}", tenant=record.target, cls=INTERACTIVE, digest=record.target,
            num_prompt_tokens=record.prompt_tokens, max_new_tokens=record.output_tokens, deadline_ms=FAR_AHEAD_MS,
            gateway="",
        )  # fmt: skip
        arrivals.append(Arrival(1000 * (record.start_s - records[0].start_s), submit, record.output_tokens))
    return arrivals


def real_figures(result: BenchResult) -> dict[str, float]:
    """Return the figures to compare, as measured by the client."""
    summary = result.summary
    return {
        "tok/s": summary.output_tokens_per_s, "TTFT p50, ms": summary.ttft.p50_ms, "TTFT p90, ms": summary.ttft.p90_ms,
        "answer p50, ms": summary.e2e.p50_ms, "answer p90, ms": summary.e2e.p90_ms,
    }  # fmt: skip


def simulated_figures(
    arrivals: Sequence[Arrival], model: WorkerModel, facts: dict[str, AdapterFacts]
) -> dict[str, float]:
    """Return the same figures from a simulation."""
    outcome = Simulation(make_dispatcher(POLICIES[0], SchedulerConfig(), facts), model, 1, facts).run(arrivals)
    first = np.array([request.first_ms - request.submitted_ms for request in outcome.requests])
    whole = np.array([request.ended_ms - request.submitted_ms for request in outcome.requests])
    return {
        "tok/s": outcome.output_tokens_per_s, "TTFT p50, ms": float(np.percentile(first, 50)),
        "TTFT p90, ms": float(np.percentile(first, 90)), "answer p50, ms": float(np.percentile(whole, 50)),
        "answer p90, ms": float(np.percentile(whole, 90)),
    }  # fmt: skip


def step_s(running: RunningFleet) -> float:
    """Return the total seconds of the worker's steps since its start."""
    total = running.beats_of_now()[0].counters
    return total.plan_s + total.inputs_s + total.forward_s + total.sample_s + total.finish_s


def measure_way_ms(running: RunningFleet) -> float:
    """Return the ms that a request takes outside its steps, from single one-token requests of one step each."""
    before_s = step_s(running)
    alone = replace(config(running.url, num_requests=NUM_ALONE, concurrency=1, seed=4), output_tokens=1)
    whole_s = sum(record.end_s - record.start_s for record in run_bench(alone).records)
    return 1000 * (whole_s - (step_s(running) - before_s)) / NUM_ALONE


def worker_model(beat: m.WorkerBeat, way_ms: float) -> WorkerModel:
    """Return a simulated worker with the figures of a heartbeat."""
    return WorkerModel(
        capacity=beat.capacity, max_step_tokens=STEP_TOKENS, step=beat.step_model,
        pool_bytes=beat.pool_bytes_total, host_bytes=beat.pool_bytes_total, bandwidths=AT_ONCE,
        way_ms=way_ms,
    )  # fmt: skip


def slower(model: WorkerModel) -> WorkerModel:
    """Return the worker with all steps slowed down by the factor `SLOWER`."""
    step = model.step
    return replace(model, step=m.StepModel(*(SLOWER * term for term in (step.a, step.b, step.c, step.d, step.e))))


def draw(axes: Sequence[Any], results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Draw the ratios of simulated to real figures, one panel per load."""
    for axis, (load, rows) in zip(axes, results.items(), strict=True):
        names = list(rows["real"])
        for offset, (how, color) in zip((-0.2, 0.2), SIMULATED.items(), strict=True):
            ratios = [rows[how][name] / rows["real"][name] for name in names]
            axis.barh(np.arange(len(names)) + offset, ratios, 0.4, color=color, label=how)
        axis.axvspan(0.9, 1.1, color=report.GREEN, alpha=0.25)
        axis.axvline(1, color=report.INK, linewidth=1)
        axis.set(yticks=range(len(names)), yticklabels=names, title=load, xlabel="simulated ÷ real")
        axis.invert_yaxis()
    axes[0].legend(loc="lower left", frameon=True, framealpha=1)


def main() -> None:
    """Measure a fleet and simulate it, and write both results."""
    args = report.parser(__doc__).parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    seconds = 20 if args.short else 45
    results: dict[str, dict[str, dict[str, float]]] = {}
    models: dict[str, Any] = {}
    with scratch_folder() as scratch:
        adapters = scratch / "adapters"
        make_adapters(model, adapters, NAMES, [RANK])
        facts = {name: AdapterFacts(RANK, adapter_bytes(adapters, name)) for name in NAMES}
        with fleet(Setup(model, adapters, scratch)) as running:
            run_bench(config(running.url, num_requests=len(NAMES) * 2, concurrency=CONCURRENCY))
            at_full = run_bench(config(running.url, num_requests=4 * CONCURRENCY, concurrency=CONCURRENCY, seed=1))
            way_ms = measure_way_ms(running)
            for number, (load, share) in enumerate(SHARES.items()):
                for size in RAMP:
                    run_bench(config(running.url, num_requests=2 * size, concurrency=size, seed=100 * number + size))
                rate = share * at_full.summary.requests_per_s
                rehearsal = round(rate * REHEARSAL_S)
                run_bench(
                    config(running.url, num_requests=rehearsal, concurrency=512, rate_per_s=rate, seed=20 + number)
                )
                beat = running.beats_of_now()[0]
                asked = config(
                    running.url, num_requests=round(rate * seconds), concurrency=512, rate_per_s=rate, seed=2 + number
                )
                result = run_bench(asked)
                results[load] = {"real": real_figures(result)}
                models[load] = {"rate_per_s": rate}
                arrivals = trace(result)
                after = running.beats_of_now()[0]
                for how, known in zip(SIMULATED, (beat, after), strict=True):
                    results[load][how] = simulated_figures(arrivals, worker_model(known, way_ms), facts)
                    models[load][how] = msgspec.to_builtins(known.step_model)
                by_slower = simulated_figures(arrivals, slower(worker_model(after, way_ms)), facts)
                results[load]["replayed, slower"] = by_slower
    rows = [
        (
            load, name, *(f"{of[how][name]:,.0f}" for how in ("real", *SIMULATED)),
            *(f"{of[how][name] / of['real'][name]:.2f}" for how in SIMULATED),
            f"{of['replayed, slower'][name] / of['replayed'][name]:.2f}",
        )
        for load, of in results.items()
        for name in of["real"]
    ]  # fmt: skip
    heads = ("load", "figure", "real", *SIMULATED, *(f"{how} ÷ real" for how in SIMULATED), "with steps 2.5 % longer")
    print(report.table(heads, rows))
    print(f"a request takes {way_ms:.1f} ms beside its steps")
    saved = {"machine": machine, "seconds": seconds, "way_ms": way_ms, "worker": models, "figures": results}
    report.save(args.out / "prediction", saved)
    report.plot(args.out / "prediction", len(SHARES), lambda axes: draw(axes, results))


if __name__ == "__main__":
    main()
