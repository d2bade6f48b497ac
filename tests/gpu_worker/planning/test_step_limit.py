"""Limits on how much yielding sequences lengthen steps: which take part in which step, and what is measured."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from gpu_worker.engine.step_model import StepMeter, StepWork
from gpu_worker.planning.batcher import Batcher
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_limit import ALONE_EVERY, SHORT_STEPS_AFTER
from protocol.wire.messages import StepModel
from tests.gpu_worker.planning.batches import finish_step, make_batcher, make_seq


def limited_flood(num: int = 6, *, max_slowdown: float) -> tuple[Batcher, Sequence, list[Sequence]]:
    """Return a batcher, a decoding sequence, and a decoding flood that yields; a step takes 1 s + 0.1 s per token."""
    batcher, _ = make_batcher(64, max_num_seqs=8, max_slowdown=max_slowdown)
    quiet = make_seq("quiet", np.arange(4) + 100, 500)
    flood = [make_seq(f"flood{i}", np.arange(4) + 4 * i, 500, yields=True) for i in range(num)]
    for seq in (quiet, *flood):
        batcher.add(seq)
    while any(seq.num_output == 0 for seq in (quiet, *flood)):
        finish_step(batcher, batcher.plan())
    batcher.step_model = StepModel(a=1.0, b=0.1)
    return batcher, quiet, flood


def test_what_yields_takes_turns_in_the_time_that_others_leave() -> None:
    batcher, quiet, flood = limited_flood(max_slowdown=1.3)
    plan = batcher.plan()
    assert plan.num_new == {quiet: 1}, "first it is measured how long that takes"
    batcher.note_time(plan, 1.1)
    finish_step(batcher, plan)
    turns = []
    for _ in range(4):
        plan = batcher.plan()
        assert plan.num_new.pop(quiet) == 1
        turns.append(list(plan.num_new))
        finish_step(batcher, plan)
    # 1.3 x 1.1 s leave 0.33 s for the flood: three tokens a step.
    assert turns == [flood[:3], flood[3:], flood[:3], flood[3:]]


def test_a_step_is_limited_by_what_others_were_measured_to_take() -> None:
    batcher, quiet, _ = limited_flood(max_slowdown=2.0)
    plan = batcher.plan()
    assert plan.num_new == {quiet: 1}
    batcher.note_time(plan, 0.83)  # the model predicts 1.1
    finish_step(batcher, plan)
    assert batcher.plan().num_tokens == 1 + 5, "1.1 s and five times 0.1 s are within twice 0.83 s"


@pytest.mark.parametrize("seconds", [(2.2, 0.83, 0.83, 3.3, 0.83), (0.83, 0.4, 0.83, 0.2, 0.83), (2.2, 0.83)])
def test_steps_that_were_slow_or_fast_by_chance_change_no_limit(seconds: tuple[float, ...]) -> None:
    batcher, _, _ = limited_flood(max_slowdown=2.0)
    for alone_s in seconds:
        for _ in range(ALONE_EVERY):
            plan = batcher.plan()
            batcher.note_time(plan, alone_s if plan.num_tokens == 1 else 1.0 + 0.1 * plan.num_tokens)
            finish_step(batcher, plan)
    assert batcher.plan().num_tokens == 1, "it is measured again"
    assert batcher.plan().num_tokens == 1 + 5, "1.1 s and five times 0.1 s are within twice 0.83 s"


def test_steps_that_take_longer_than_expected_become_smaller() -> None:
    batcher, _, _ = limited_flood(max_slowdown=1.5)
    sizes = []
    for _ in range(8):
        plan = batcher.plan()
        sizes.append(plan.num_tokens - 1)
        batcher.note_time(plan, 1.1 if plan.num_tokens == 1 else 1.1 + 0.2 * (plan.num_tokens - 1))
        finish_step(batcher, plan)
    assert sizes[:2] == [0, 5], "by the model, 1.5 x 1.1 s leave room for five"
    assert set(sizes[2:]) == {2}, "they took 2.1 s, twice as much more as expected; 1.5 s are within the limit"


def test_others_are_measured_again_and_again() -> None:
    batcher, quiet, _ = limited_flood(max_slowdown=3.0)
    alone = []
    for at in range(2 * ALONE_EVERY + 1):
        plan = batcher.plan()
        batcher.note_time(plan, 1.1)
        if set(plan.num_new) == {quiet}:
            alone.append(at)
        finish_step(batcher, plan)
    assert alone == [0, ALONE_EVERY, 2 * ALONE_EVERY]


def test_somebody_who_yields_goes_on_however_little_time_there_is() -> None:
    batcher, quiet, flood = limited_flood(3, max_slowdown=1.0)
    plan = batcher.plan()
    batcher.note_time(plan, 0.01)
    finish_step(batcher, plan)
    assert [list(batcher.plan().num_new) for _ in range(4)] == [[quiet, flood[i % 3]] for i in range(4)]


def test_a_yielding_prompt_goes_on_by_tokens_where_a_token_takes_long() -> None:
    batcher, quiet, _ = limited_flood(0, max_slowdown=1.5)
    batcher.step_model = StepModel(a=1.0, b=0.4)
    batcher.add(make_seq("late", np.arange(40) + 200, 50, yields=True))
    batcher.note_time(batcher.plan(), 1.4)
    for _ in range(3):
        plan = batcher.plan()
        assert plan.num_new.pop(quiet) == 1
        assert list(plan.num_new.values()) == [1], "a block of it would be 6.4 s"
        finish_step(batcher, plan)


def test_how_long_others_take_is_known_before_anybody_yields() -> None:
    batcher, quiet, _ = limited_flood(0, max_slowdown=2.0)
    for _ in range(2 * ALONE_EVERY):
        plan = batcher.plan()
        batcher.note_time(plan, 1.23)  # the model predicts 1.1
        finish_step(batcher, plan)
    batcher.add(make_seq("late", np.arange(40) + 200, 50, yields=True))
    plan = batcher.plan()
    assert plan.num_new.pop(quiet) == 1
    assert list(plan.num_new.values()) == [13], "twice 1.23 s less 1.1 s, at 0.1 s a token"


def test_all_of_a_tenant_yields_once_one_of_its_requests_does() -> None:
    batcher, _ = make_batcher(64, max_num_seqs=8)
    running, waiting, strangers = (make_seq(name, np.arange(4), 500, tenant=name[0]) for name in ("a1", "a2", "b1"))
    batcher.add(running)
    finish_step(batcher, batcher.plan())
    batcher.add(waiting)
    batcher.add(strangers)
    batcher.add(make_seq("a3", np.arange(4), 500, tenant="a", yields=True))
    assert (running.yields, waiting.yields, strangers.yields) == (True, True, False)


def test_a_tenant_of_few_long_prompts_fills_no_more_than_a_step() -> None:
    batcher, _ = make_batcher(1024, max_num_seqs=16, max_step_tokens=64, max_slowdown=2.0)
    quiet = make_seq("quiet", np.arange(4), 500, tenant="quiet")
    batcher.add(quiet)
    for _ in range(60):
        finish_step(batcher, batcher.plan())
    batcher.step_model = StepModel(a=1.0, b=0.1)
    heavy = [make_seq(f"heavy{i}", np.arange(500) + i, 5, tenant="heavy") for i in range(3)]
    for seq in heavy:
        batcher.add(seq)
    sizes = []
    for _ in range(40):
        plan = batcher.plan()
        assert plan.num_new[quiet] == 1
        sizes.append(plan.num_tokens)
        finish_step(batcher, plan)
    assert (sizes[0], max(sizes[4:])) == (64, 12), "twice 1.1 s are 11 tokens more"
    assert not quiet.yields
    for seq in heavy:
        batcher.remove(seq)
    for _ in range(200):
        finish_step(batcher, batcher.plan())
    late = make_seq("late", np.arange(30) + 900, 5, tenant="heavy")
    batcher.add(late)
    assert batcher.plan().num_new == {quiet: 1, late: 30}, "long ago counts no more"


def test_who_was_alone_yields_no_longer_to_one_who_fills_the_steps() -> None:
    """A tenant that is alone yields to a newcomer; once the newcomer takes most of each step, the newcomer yields."""
    batcher, _ = make_batcher(1024, max_num_seqs=16, max_step_tokens=64, max_slowdown=2.0)
    quiet = make_seq("quiet", np.arange(4), 900, tenant="quiet", alone=True)
    line = make_seq("line", np.arange(4) + 50, 500, tenant="quiet", batch=True)
    batcher.add(quiet)
    for _ in range(60):
        finish_step(batcher, batcher.plan())
    batcher.step_model = StepModel(a=1.0, b=0.1)
    heavy = [make_seq(f"heavy{i}", np.arange(500) + i, 50, tenant="heavy") for i in range(3)]
    for seq in (*heavy, line):
        batcher.add(seq)
    assert (batcher.plan().num_tokens, quiet.priority, heavy[0].priority) == (64, 1, 0), "whoever comes does not wait"
    sizes = []
    for _ in range(40):
        plan = batcher.plan()
        sizes.append(plan.num_tokens)
        finish_step(batcher, plan)
    assert (quiet.priority, heavy[0].priority, line.priority) == (0, 1, 2)
    assert max(sizes[8:]) == 12, "twice 1.1 s are 11 tokens more"
    for seq in heavy:
        batcher.remove(seq)
    for _ in range(200):
        finish_step(batcher, batcher.plan())
    assert (quiet.priority, line.priority) == (1, 2), "alone again"


def test_who_was_alone_does_not_yield_to_what_yields_itself() -> None:
    batcher, _ = make_batcher(1024, max_slowdown=2.0)
    batcher.step_model = StepModel(a=1.0, b=0.1)
    quiet = make_seq("quiet", np.arange(4), 900, tenant="quiet", alone=True)
    equal = make_seq("equal", np.arange(4) + 50, 900, tenant="equal", yields=True)
    flood = [make_seq(f"flood{i}", np.arange(4) + 10 * i, 500, tenant="flood") for i in range(2)]
    for seq in (quiet, *flood):
        batcher.add(seq)
    batcher.plan()
    assert (quiet.priority, flood[0].priority) == (1, 0), "whoever comes does not wait"
    batcher.add(make_seq("more", np.arange(4) + 30, 500, tenant="flood", yields=True))
    batcher.add(equal)
    batcher.plan()
    assert (quiet.priority, flood[0].priority, equal.priority) == (0, 1, 1), "only one that was alone goes before them"


def test_prompts_that_yield_get_the_time_that_decodes_leave() -> None:
    batcher, quiet, flood = limited_flood(2, max_slowdown=2.0)
    plan = batcher.plan()
    batcher.note_time(plan, 1.13)
    finish_step(batcher, plan)
    late = make_seq("late", np.arange(40) + 200, 50, yields=True)
    batcher.add(late)
    assert batcher.plan().num_new == {quiet: 1, flood[0]: 1, flood[1]: 1, late: 9}


@pytest.mark.parametrize("others", [True, False])
def test_where_all_yield_or_nobody_does_plans_are_the_same_with_a_limit(others: bool) -> None:
    plans: list[list[dict[str, int]]] = []
    for max_slowdown in (0.0, 1.1):
        batcher, _ = make_batcher(64, max_slowdown=max_slowdown)
        batcher.step_model = StepModel(a=1.0, b=0.1)
        for i in range(12):
            batcher.add(make_seq(str(i), np.arange(20) + 20 * i, 6, yields=not others))
        plans.append([])
        while len(batcher):
            plan = batcher.plan()
            plans[-1].append({seq.rid: num for seq, num in plan.num_new.items()})
            finish_step(batcher, plan)
            for seq in list(plan.num_new):
                if seq.num_tokens >= seq.max_tokens:
                    batcher.remove(seq)
    assert plans[0] == plans[1]


def test_bursts_beside_a_quiet_stream_make_hardly_a_step_long() -> None:
    """In simulated time: of 1000 steps with a token of the stream, at most three take more than twice as long."""
    batcher, _ = make_batcher(1024, max_num_seqs=64, max_step_tokens=512, max_slowdown=1.8)
    meter, rng, names = StepMeter(), np.random.default_rng(1), count()

    def add(tenant: str, num_prompt: int, num_new: int, *, yields: bool) -> None:
        prompt = rng.integers(0, 5, num_prompt)
        batcher.add(make_seq(f"{tenant}{next(names)}", prompt, num_new, tenant=tenant, yields=yields))

    alone, beside = [], []
    for step in range(1300):
        if not any(seq.request.tenant == "quiet" for seq in batcher):
            add("quiet", 4, 60, yields=False)
        if step >= 300 and step % 100 == 0:
            for i in range(48):  # the first requests of a tenant do not yield
                add("flood", 4 + i, 1 + i % 60, yields=i >= 8)
        plan = batcher.plan()
        seconds = (0.010 + 0.0007 * plan.num_tokens) * rng.uniform(0.95, 1.1)
        if any(seq.request.tenant == "quiet" and seq.num_output for seq in plan.num_new):
            (beside if step >= 300 else alone).append(seconds)
        meter.learn(seconds, StepWork(plan.num_tokens, 0, 0), is_limited=plan.limited is not None)
        batcher.note_time(plan, seconds)
        batcher.step_model = meter.model
        finish_step(batcher, plan)
        for seq in [seq for seq in plan.num_new if seq.num_tokens >= seq.max_tokens]:
            batcher.remove(seq)
    assert len(beside) > 800
    assert sum(seconds > 2 * max(alone) for seconds in beside) <= 3


def test_yielding_prompts_come_last_and_in_short_steps() -> None:
    batcher, _ = make_batcher(64, max_num_seqs=8, max_step_tokens=64)
    flood = [make_seq(f"flood{i}", np.arange(20) + i, 50, yields=True) for i in range(6)]
    batcher.add(flood[0])
    batcher.add(flood[1])
    plan = batcher.plan()
    assert plan.num_new == {flood[0]: 20, flood[1]: 20}, "there are no others"
    finish_step(batcher, plan)
    quiet = make_seq("quiet", np.arange(40) + 100, 50)
    for seq in (*flood[2:], quiet):
        batcher.add(seq)
    plan = batcher.plan()
    assert plan.num_new == {flood[0]: 1, flood[1]: 1, quiet: 40}
    finish_step(batcher, plan)
    plan = batcher.plan()
    short = {quiet: 1, flood[0]: 1, flood[1]: 1, flood[2]: 13}
    assert plan.num_new == short, "twice as many tokens as there can be decodes"
    finish_step(batcher, plan)
    another = make_seq("another", np.arange(8) + 200, 50)
    batcher.add(another)
    plan = batcher.plan()
    assert list(plan.num_new) == [quiet, flood[0], flood[1], another, flood[2]], "also before a prompt that was begun"
    assert plan.num_new[another] == 8
    assert plan.num_tokens == 16
    for seq in (quiet, another):
        batcher.remove(seq)
    batcher.add(make_seq("late", np.arange(60) + 300, 50, yields=True))
    assert batcher.plan().num_tokens == 16, "others may soon be back"
    for _ in range(SHORT_STEPS_AFTER):
        plan = batcher.plan()
    assert plan.num_tokens > 16


@pytest.mark.parametrize(("token_s", "pauses"), [(0.3, True), (0.2, False)])
def test_yielding_decodes_pause_beside_anothers_prompt_if_worth_a_step(token_s: float, pauses: bool) -> None:
    batcher, _ = make_batcher(64, max_num_seqs=8, max_step_tokens=64)
    batcher.step_model = StepModel(a=1.0, b=token_s)
    flood = [make_seq(f"flood{i}", np.arange(4) + i, 50, yields=True) for i in range(4)]
    for seq in flood:
        batcher.add(seq)
    finish_step(batcher, batcher.plan())
    quiet = [make_seq(f"quiet{i}", np.arange(60) + 100 * i, 50) for i in range(2)]
    batcher.add(quiet[0])
    plan = batcher.plan()
    assert plan.num_new == ({} if pauses else dict.fromkeys(flood, 1)) | {quiet[0]: 60}
    finish_step(batcher, plan)
    batcher.add(quiet[1])
    plan = batcher.plan()
    assert plan.num_new == {quiet[0]: 1, **dict.fromkeys(flood, 1), quiet[1]: 59}, "never two steps in a row"
    finish_step(batcher, plan)
    assert batcher.plan().num_new == dict.fromkeys([*quiet[:2], *flood], 1), "beside decodes alone they go on"
