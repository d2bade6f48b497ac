"""Every fuzzing target, for about a second each: `make fuzz` tries many more cases."""

from __future__ import annotations

import pytest
from hostile.fuzz.engine import Target, run
from hostile.fuzz.targets import TARGETS, shares

NUM_CASES = 2400
"""Cases of all targets together."""

SEED = 1
NUMS = shares([target.name for target in TARGETS], NUM_CASES)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_case_crashes(target: Target) -> None:
    result = run(target, NUMS[target.name], SEED)
    assert result.crash == ""
    assert result.num_cases > 0
