"""A draft model drafts only where measured times say that this pays for every sequence of the step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gpu_worker.drafting.payoff import (
    HOPE,
    MIN_CHUNK,
    VARIED,
    Acceptance,
    Draftable,
    DraftChoice,
    Payoff,
    length_that_pays,
)
from gpu_worker.engine.step_model import MIN_STEPS

BASE_S, TOKEN_S, PASS_S = 0.1, 0.004, 0.01


def seconds(num_seqs: int, pass_s: float = PASS_S) -> Callable[[int], float]:
    """Return the time, s, of drafting and a step of `num_seqs` sequences, by the number of draft tokens of each."""
    return lambda num: BASE_S + TOKEN_S * num_seqs * (1 + num) + pass_s * num


def measured(base_s: float = BASE_S, pass_s: float = PASS_S, read_s: float = 0.001) -> Payoff:
    """Return a `Payoff` that has measured steps and passes of all sizes."""
    payoff = Payoff()
    for i in range(3 * MIN_STEPS):
        num = 1 + i % 16
        payoff.note_step(num, base_s + TOKEN_S * num)
        payoff.note_pass(num, pass_s + read_s * num)
    return payoff


def candidate(rate: float = 0.8, limit: int = 8, num_unread: int = 2, num_steps: int = 50) -> Draftable:
    return Draftable(rate, limit, num_unread, num_steps)


def test_more_right_tokens_make_longer_drafts() -> None:
    lengths = [length_that_pays([(rate, 8)], 8, seconds(1))[0] for rate in (0.05, 0.3, 0.6, 0.8, 0.95)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, 8)


def test_the_gain_is_that_of_the_formula() -> None:
    num, gain = length_that_pays([(0.5, 1)], 1, seconds(1))
    assert (num, gain) == (1, pytest.approx(1.5 * (BASE_S + TOKEN_S) / (BASE_S + 2 * TOKEN_S + PASS_S)))


def test_a_draft_model_as_slow_as_the_base_never_pays() -> None:
    assert length_that_pays([(0.95, 8)], 8, seconds(1, BASE_S))[0] == 0


def test_who_gains_least_decides() -> None:
    """Drafting for the others would delay a sequence whose own drafts are wrong."""
    good, bad = (0.9, 8), (0.1, 8)
    assert length_that_pays([good, good], 4, seconds(2))[0] == 4
    assert length_that_pays([good, bad], 4, seconds(2))[0] == 0
    assert length_that_pays([good, (0.9, 1)], 4, seconds(2))[0] <= 1


def test_where_wrong_tokens_take_another_step_less_is_drafted() -> None:
    num, gain = length_that_pays([(0.9, 1)], 1, seconds(1), repeats=True)
    assert (num, gain) == (1, pytest.approx(2 / 1.1 * (BASE_S + TOKEN_S) / (BASE_S + 2 * TOKEN_S + PASS_S)))
    assert length_that_pays([(0.6, 8)], 8, seconds(1))[0] > 2
    assert length_that_pays([(0.6, 8)], 8, seconds(1), repeats=True)[0] <= 1
    assert length_that_pays([(1.0, 8)], 8, seconds(1), repeats=True) == length_that_pays([(1.0, 8)], 8, seconds(1))


def test_nothing_is_drafted_before_steps_were_measured() -> None:
    payoff = Payoff()
    for i in range(2 * MIN_STEPS):
        payoff.note_pass(1 + i % 16, PASS_S)
    assert payoff.choose([candidate()], 8, 1) == DraftChoice()
    for _ in range(MIN_STEPS):
        payoff.note_step(1, BASE_S)
    assert payoff.choose([candidate()], 8, 1).num_drafts > 0


def test_it_stops_where_steps_with_more_tokens_turn_out_long() -> None:
    """The cost of more tokens is unknown while every step has one; the first steps with drafts reveal it."""
    payoff = Payoff()
    for i in range(2 * MIN_STEPS):
        payoff.note_pass(1 + i % 16, PASS_S)
        payoff.note_step(1, BASE_S)
    num_drafted = 0
    for _ in range(40 * MIN_STEPS):
        num = payoff.choose([candidate(0.7)], 8, 1).num_drafts
        num_drafted += num > 0
        payoff.note_step(1 + num, BASE_S * (1 + num))
    assert payoff.choose([candidate(0.7)], 8, 1) == DraftChoice()
    assert VARIED <= num_drafted <= VARIED + MIN_STEPS


def test_a_text_is_read_once_its_request_has_had_enough_steps() -> None:
    payoff = measured()
    unread = 400  # reading takes 0.4 s, and a step saves at most 0.1 s
    by_steps = [payoff.choose([candidate(num_unread=unread, num_steps=num)], 8, 1) for num in range(100)]
    first = next(num for num, choice in enumerate(by_steps) if choice.num_drafts)
    assert 4 < first < 20
    both = [candidate(num_unread=unread, num_steps=num) for num in (99, 1)]
    assert payoff.choose(both, 4, 2) == DraftChoice()


def test_it_reads_no_longer_at_once_than_a_step_takes() -> None:
    payoff = measured()
    payoff.note_pass(64, PASS_S + 0.064)
    choice = payoff.choose([candidate(num_unread=90)], 8, 1)
    assert choice.num_read == pytest.approx((BASE_S + TOKEN_S - PASS_S) / 0.001, rel=0.1)
    short = measured(base_s=0.02, pass_s=0.001, read_s=0.002).choose([candidate()], 8, 1)
    assert (short.num_drafts > 0, short.num_read) == (True, MIN_CHUNK)


def test_many_tokens_are_read_at_once_only_after_nearly_as_many() -> None:
    """That short passes take the same time, however much they read, says nothing about long ones."""
    payoff = measured(read_s=0.0)
    num_read: list[int] = []
    for _ in range(4):
        num_read.append(payoff.choose([candidate(num_unread=10**5, num_steps=10**6)], 8, 1).num_read)
        payoff.note_pass(num_read[-1], PASS_S)
    assert num_read == [32, 64, 128, 256]


def test_reading_a_text_in_many_passes_costs_all_of_them() -> None:
    """Even if further tokens are free, passes are not: 3000 of 0.01 s each, while a step saves less than 0.1 s."""
    payoff = measured(read_s=0.0)
    wanted = [payoff.choose([candidate(num_unread=10**5, num_steps=num)], 8, 1).num_drafts > 0 for num in (300, 10**4)]
    assert wanted == [False, True]


def test_reading_is_worth_it_for_all_together() -> None:
    """A step that gets 60 ms shorter saves 60 ms in total, not 60 ms for each of its sequences."""
    payoff = measured(pass_s=0.001, read_s=0.0005)
    one = candidate(num_unread=400, num_steps=6)
    assert payoff.choose([one], 4, 1).num_drafts > 0
    assert payoff.choose([one] * 4, 4, 4).num_drafts == 0
    later = candidate(num_unread=400, num_steps=60)
    assert payoff.choose([later] * 4, 4, 4).num_drafts > 0
    assert payoff.choose([later, candidate(num_steps=0)], 4, 2) == DraftChoice()


def test_passes_that_were_slow_by_chance_are_measured_again() -> None:
    """For example beside busy processes at the start. Probing takes little time, however slow passes are."""
    payoff = measured(pass_s=10 * PASS_S, read_s=0.01)
    num_steps = num_probes = 0
    while not payoff.choose([candidate()], 8, 1).num_drafts:
        payoff.note_step(1, BASE_S + TOKEN_S)
        num_steps += 1
        if payoff.is_probe_due(2):
            payoff.note_pass(2, PASS_S + 0.002)
            num_probes += 1
    assert num_probes > 0
    assert num_steps < 200_000
    slow, slow_s = measured(pass_s=50 * BASE_S), 0.0
    for _ in range(20_000):
        slow.note_step(1, BASE_S + TOKEN_S)
        if slow.is_probe_due(1):
            slow.note_pass(1, 50 * BASE_S)
            slow_s += 50 * BASE_S
    assert 0 < slow_s < 20_000 * BASE_S / 64


def test_the_share_of_right_tokens_is_learnt() -> None:
    rng, acceptance = np.random.default_rng(0), Acceptance()
    seen: list[float] = []
    for _ in range(400):
        wrong = np.flatnonzero(rng.random(4) >= 0.6)
        acceptance.learn(4, int(wrong[0]) if len(wrong) else 4)
        seen.append(acceptance.rate)
    assert np.mean(seen[50:]) == pytest.approx(0.6, abs=0.05)
    assert np.std(seen[50:]) < 0.15


def test_drafts_that_are_always_wrong_become_rare_and_stay_so() -> None:
    """Drafts are still tried, because texts change, but the trials cost almost nothing."""
    payoff, acceptance = measured(), Acceptance()
    drafted: list[bool] = []
    for _ in range(4000):
        num = payoff.choose([candidate(acceptance.rate)], 8, 1).num_drafts
        drafted.append(num > 0)
        if num:
            acceptance.learn(num, 0)
        else:
            acceptance.rest()
    assert sum(drafted[:40]) < 30
    assert 0 < sum(drafted[1000:]) < 3000 / 30
    for _ in range(4000):
        acceptance.rest()
    assert acceptance.rate == pytest.approx(HOPE, abs=0.02)
