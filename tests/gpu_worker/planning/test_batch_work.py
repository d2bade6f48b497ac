"""Batch work yields to all other requests, even to those that yield, and hardly lengthens their steps."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from gpu_worker.engine.step_model import StepMeter, StepWork
from gpu_worker.planning.batcher import Batcher
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_limit import SHORT_STEPS_AFTER
from protocol.wire.messages import StepModel
from tests.gpu_worker.planning.batches import finish_step, make_batcher, make_seq


def filled(*others: Sequence, num: int = 6) -> tuple[Batcher, list[Sequence]]:
    """Return a batcher in which `num` batch sequences and `others` decode; a step takes 1 s plus 0.04 s per token."""
    batcher, _ = make_batcher(256, max_num_seqs=8, max_step_tokens=512, max_slowdown=2.0, max_batch_slowdown=1.1)
    lines = [make_seq(f"line{i}", np.arange(4) + 4 * i, 500, batch=True, tenant="t") for i in range(num)]
    for seqs in (lines, others):
        for seq in seqs:
            batcher.add(seq)
        while any(seq.num_output == 0 for seq in seqs):
            finish_step(batcher, batcher.plan())
    batcher.step_model = StepModel(a=1.0, b=0.04)
    return batcher, lines


def run(batcher: Batcher, num: int) -> list[list[str]]:
    """Return the request ids of each of the next `num` steps, timed as the step model predicts."""
    found: list[list[str]] = []
    for _ in range(num):
        plan = batcher.plan()
        batcher.note_time(plan, batcher.step_model.seconds(plan.num_tokens, 0, 0))
        finish_step(batcher, plan)
        found.append([seq.rid for seq in plan.num_new])
    return found


def test_batch_work_has_a_bound_of_its_own() -> None:
    batcher, _ = filled(make_seq("quiet", np.arange(4) + 100, 500))
    plans = run(batcher, 4)
    plans.remove(["quiet"])  # alone once, to measure the time of its step
    assert plans == [["quiet", *(f"line{i}" for i in turn)] for turn in ((0, 1), (2, 3), (4, 5))], "0.104 s are left"


def test_batch_work_yields_to_tenants_that_would_yield_themselves() -> None:
    batcher, _ = filled(make_seq("flood", np.arange(4) + 100, 500, yields=True, tenant="t"))
    assert run(batcher, 2) == [["flood", "line0", "line1"], ["flood"]], "then it is measured what that takes"


def test_a_batch_does_not_make_the_rest_of_its_tenant_yield() -> None:
    quiet = make_seq("quiet", np.arange(4) + 100, 500, tenant="t")
    batcher, _ = filled(quiet)
    run(batcher, 100)
    assert not quiet.yields


def test_batch_work_is_in_no_step_with_a_prompt_of_others() -> None:
    batcher, _ = filled(make_seq("quiet", np.arange(4) + 100, 500))
    batcher.add(make_seq("long", np.arange(1200), 5))
    assert run(batcher, 3) == 3 * [["quiet", "long"]], "in three steps, one after the other"
    assert len(run(batcher, 1)[0]) > 2


def test_steps_of_batch_work_alone_are_short_while_others_may_come() -> None:
    quiet = make_seq("quiet", np.arange(4) + 100, 500)
    batcher, lines = filled(quiet)
    batcher.remove(quiet)
    batcher.step_model = StepModel(a=0.1, b=0.09)  # within three times an empty step there is room for two tokens
    plans = run(batcher, SHORT_STEPS_AFTER + 3)
    assert [len(plan) for plan in plans[: SHORT_STEPS_AFTER - 1]] == (SHORT_STEPS_AFTER - 1) * [2]
    assert plans[-1] == [seq.rid for seq in lines], "nobody has come for long"


def test_batch_work_waits_where_a_flood_and_a_quiet_stream_are() -> None:
    quiet, flood = make_seq("quiet", np.arange(4) + 100, 500), make_seq("flood", np.arange(4) + 200, 500, yields=True)
    batcher, lines = filled(quiet, flood, num=3)
    assert {rid for plan in run(batcher, 5) for rid in plan} == {"quiet", "flood"}
    for seq in (quiet, flood):
        batcher.remove(seq)
        seq.is_bound = False  # as while its adapter is loading
        batcher.add(seq)
    assert run(batcher, 1) == [[seq.rid for seq in lines]], "nobody else can run"


def test_batch_work_is_the_first_to_lose_its_place() -> None:
    flood = [make_seq(f"flood{i}", np.arange(4) + 100 + 4 * i, 500, yields=True) for i in range(2)]
    batcher, _ = filled(*flood)
    batcher.add(make_seq("late", np.arange(4) + 300, 5, yields=True))
    assert [seq.rid for seq in batcher.plan().preempted] == ["line5"]


def percentiles_of(*, with_batch: bool) -> tuple[float, float]:
    """Return the 99th percentiles, s, of TTFT and of the gaps between tokens.

    Load is a third of a CPU's capacity. Time is simulated: a step takes about 8 ms plus 0.45 ms per token.
    """
    batcher, _ = make_batcher(4096, max_num_seqs=64, max_step_tokens=512, max_slowdown=1.8, max_batch_slowdown=1.1)
    meter, rng, arrivals, names = StepMeter(), np.random.default_rng(1), np.random.default_rng(2), count()
    now_s, next_s = 0.0, 0.0
    last_s: dict[Sequence, float] = {}  # arrival, or time of the last token
    found: dict[bool, list[float]] = {True: [], False: []}  # is first token -> times, s
    while now_s < 40.0:
        while next_s <= now_s:
            seq = make_seq(f"r{next(names)}", rng.integers(0, 50, 96), 64, yields=True, tenant="t")
            last_s[seq] = next_s
            batcher.add(seq)
            next_s += arrivals.exponential(1 / 6.8)
        for _ in range(48 * with_batch - sum(seq.request.batch for seq in batcher)):
            batcher.add(make_seq(f"line{next(names)}", rng.integers(0, 50, 30), 64, batch=True, tenant="t"))
        if not len(batcher):
            now_s = next_s
            continue
        plan = batcher.plan()
        seconds = (0.008 + 0.00045 * plan.num_tokens) * rng.uniform(0.95, 1.1)
        now_s += seconds
        meter.learn(seconds, StepWork(plan.num_tokens, 0, 0), is_limited=plan.limited is not None)
        batcher.note_time(plan, seconds)
        batcher.step_model = meter.model
        finish_step(batcher, plan)
        for seq in [seq for seq in plan.num_new if seq.num_pending == 1 and seq.num_output]:
            if seq in last_s and now_s > 5.0:  # before, too few step times are measured
                found[seq.num_output == 1].append(now_s - last_s[seq])
            last_s |= {seq: now_s} if seq in last_s else {}
            if seq.num_tokens >= seq.max_tokens:
                batcher.remove(seq)
    return float(np.percentile(found[True], 99)), float(np.percentile(found[False], 99))


@pytest.mark.thorough
def test_whoever_asks_hardly_notices_that_a_batch_fills_the_worker() -> None:
    for alone, beside in zip(percentiles_of(with_batch=False), percentiles_of(with_batch=True), strict=True):
        assert beside <= 1.2 * alone
