"""Every kind of adapter besides LoRA gives PEFT's logits, beside others, on each kind of base."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle.adapters.kind_cases import CASES
from oracle.adapters.peft_kinds import MAX_DIFFERENCE, make_adapter, measure

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of PEFT's SHiRA


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    make_adapter(CASES[name], tmp_path)
    measured = measure(CASES[name], tmp_path, max_step_tokens=16, max_num_seqs=8)
    assert measured.difference <= MAX_DIFFERENCE
    assert measured.change >= 100 * MAX_DIFFERENCE
