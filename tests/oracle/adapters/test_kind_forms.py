"""Other forms of the kinds besides LoRA, on other bases: Qwen3, a mixture, a hybrid; rows in int8; after training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from oracle.adapters.kind_cases import BASES, CASES, FORMS
from oracle.adapters.peft_kinds import LLAMA, MAX_DIFFERENCE, make_adapter, measure, train_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of PEFT's SHiRA

ELSEWHERE = [
    (name, base) for name, kind in CASES.items() for base in BASES
    if kind.base == LLAMA and (name, base) != ("ln_tuning", "falcon_h1")  # PEFT fails on its norm without a weight
]  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    make_adapter(FORMS[name], tmp_path)
    measured = measure(FORMS[name], tmp_path, max_step_tokens=16, max_num_seqs=8)
    assert measured.difference <= MAX_DIFFERENCE
    assert measured.change >= 100 * MAX_DIFFERENCE


@pytest.mark.parametrize(("name", "base"), ELSEWHERE)
def test_other_bases_give_what_peft_gives(name: str, base: str, tmp_path: Path) -> None:
    kind = replace(CASES[name], base=BASES[base])
    make_adapter(kind, tmp_path)
    measured = measure(kind, tmp_path, max_step_tokens=16, max_num_seqs=8)
    assert measured.difference <= MAX_DIFFERENCE
    assert measured.change >= 10 * MAX_DIFFERENCE


@pytest.mark.parametrize("name", CASES)
def test_a_trained_adapter_is_read(name: str, tmp_path: Path) -> None:
    """As PEFT leaves it after a few steps of training: with its own start, in which much is zero."""
    train_adapter(CASES[name], tmp_path)
    measured = measure(CASES[name], tmp_path)
    assert measured.difference <= MAX_DIFFERENCE
    assert measured.change > 2 * MAX_DIFFERENCE
