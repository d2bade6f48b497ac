"""The step time model recovers the terms from which times were made, and predicts nothing before it has enough data."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_worker.engine.step_model import MIN_STEPS, SURPRISE, StepFit, StepMeter, StepWork
from protocol.wire.messages import StepModel


def steps(num: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Return (tokens, kv_tokens, ranks) of `num` mixed decodes and prefills."""
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.random(num) < 0.3, rng.integers(100, 512, num), rng.integers(1, 64, num))
    return list(
        zip(tokens.tolist(), rng.integers(0, 50_000, num).tolist(), rng.integers(0, 600, num).tolist(), strict=True)
    )


def fit(truth: StepModel, num: int, noise: float = 0.0) -> StepModel:
    fitted = StepFit()
    rng = np.random.default_rng(1)
    for tokens, kv, ranks in steps(num):
        seconds = truth.a + truth.b * tokens + truth.c * kv + truth.d * ranks
        fitted.add(seconds * (1 + noise * rng.standard_normal()), tokens, kv, ranks)
    return fitted.model()


def test_the_terms_are_found() -> None:
    truth = StepModel(a=0.01, b=5e-4, c=2e-8, d=1e-5)
    found = fit(truth, 400, noise=0.02)
    assert found.a == pytest.approx(truth.a, rel=0.15)
    assert found.b == pytest.approx(truth.b, rel=0.05)
    assert found.c == pytest.approx(truth.c, rel=0.5)
    assert found.d == pytest.approx(truth.d, rel=0.15)


def test_steps_that_are_slow_by_chance_count_as_much_as_others() -> None:
    """Predictions for many steps add up to the measured total."""
    fitted, rng, sums = StepFit(), np.random.default_rng(2), np.zeros(2)
    for tokens, kv, ranks in steps(3000):
        seconds = (0.01 + 5e-4 * tokens) * rng.gamma(6.0, 1 / 6.0)  # standard deviation 40 %
        model = fitted.model()
        sums += (seconds, model.a + model.b * tokens + model.c * kv + model.d * ranks)
        fitted.add(seconds, tokens, kv, ranks)
    assert sums[1] == pytest.approx(sums[0], rel=0.05)


def test_passes_of_one_sequence_are_told_from_their_tokens() -> None:
    """Where sequences run unbatched, each pass has a fixed cost, the same for a decode as for a prompt."""
    truth, fitted = StepModel(a=0.001, b=2e-4, e=0.01), StepFit()
    rng = np.random.default_rng(3)
    for _ in range(400):
        decodes, prompt = int(rng.integers(1, 32)), int(rng.integers(0, 2) * rng.integers(100, 500))
        tokens, passes = decodes + prompt, decodes + bool(prompt)
        fitted.add(truth.seconds(tokens, 0, 0, passes), tokens, 0, 0, passes)
    found = fitted.model()
    assert found.e == pytest.approx(truth.e, rel=0.02)
    assert found.b == pytest.approx(truth.b, rel=0.02)


def test_no_term_is_negative() -> None:
    truth = StepModel(a=0.01, b=5e-4, c=-1e-8, d=0.0)
    found = fit(truth, 400, noise=0.05)
    assert min(found.a, found.b, found.c, found.d) >= 0
    assert found.b == pytest.approx(truth.b, rel=0.2)


def test_a_term_that_never_varied_takes_no_time() -> None:
    fitted = StepFit()
    for tokens, _, _ in steps(100):
        fitted.add(0.01 + 5e-4 * tokens, tokens, 0, 0)
    found = fitted.model()
    assert (found.c, found.d) == (0.0, 0.0)
    assert found.b == pytest.approx(5e-4, rel=0.01)


def test_few_steps_tell_nothing() -> None:
    truth = StepModel(a=0.01, b=5e-4)
    assert fit(truth, MIN_STEPS - 1) == StepModel()
    assert fit(truth, MIN_STEPS) != StepModel()


def test_a_change_is_followed() -> None:
    fitted = StepFit()
    for slowness in (1.0, 3.0):
        for tokens, kv, ranks in steps(3000):
            fitted.add(slowness * (0.01 + 5e-4 * tokens), tokens, kv, ranks)
    assert fitted.model().b == pytest.approx(1.5e-3, rel=0.05)


def test_what_recent_steps_leave_open_stays_known() -> None:
    truth, fitted = StepModel(a=0.01, b=5e-4, c=2e-8), StepFit()
    rng = np.random.default_rng(3)
    for tokens, kv, _ in [*steps(400), *[(1, 60, 0)] * 20_000]:
        fitted.add((truth.a + truth.b * tokens + truth.c * kv) * (1 + 0.05 * rng.standard_normal()), tokens, kv, 0)
    assert fitted.model().b == pytest.approx(truth.b, rel=0.2)


@pytest.mark.parametrize("is_limited", [True, False])
def test_one_long_step_tells_at_once_what_more_tokens_cost(is_limited: bool) -> None:
    """Where step time is limited: otherwise another long step would run before the terms are solved again."""
    meter = StepMeter()
    for step in range(MIN_STEPS):
        meter.learn(0.01, StepWork(4 if step == 0 else 1, 50, 0))
    assert meter.model.seconds(48, 50, 0) < 0.02, "small steps do not tell"
    meter.learn(0.01 * SURPRISE, StepWork(1, 50, 0), is_limited=is_limited)
    meter.learn(0.075, StepWork(48, 50, 0), is_limited=is_limited)
    assert (meter.model.seconds(48, 50, 0) > 0.05) == is_limited
