"""Every fuzzing target, for a second or two each: `make fuzz` tries many more cases."""

from __future__ import annotations

import pytest
from helpers import examples
from hostile.fuzz.engine import run
from hostile.fuzz.targets import TARGETS, shares

NUM_CASES = 4800
"""Total cases of all targets."""

SEED = 1
NUMS = shares([target.name for target in TARGETS], NUM_CASES)


@pytest.mark.parametrize("name", examples.some(NUMS, "bodies and paths of every route", "bytes at the HTTP server"))
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")  # a gateway in a thread does
def test_no_case_crashes(name: str) -> None:
    (target,) = [target for target in TARGETS if target.name == name]
    result = run(target, NUMS[name], SEED)
    assert result.crash == ""
    assert result.num_cases > 0
